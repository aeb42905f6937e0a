"""Tells which part of a model fits into each memory, and estimates how fast it will be.

`Machine` (the hardware) and the options give a `MemoryPlan`. With `MachineSpeeds` it gives a
`ModelPlan`, and a `MachinePlan` has one for each model in question.

- plan.py: the plans of models, on the GPUs or on the CPU if that is faster
- hardware.py: the machine that a plan is for, this one or one that a person describes
- fitting.py: places a model in memory, for a plan and for loading
- expectation.py: estimates how fast it decodes and reads prompts
- gpu_costs.py: the seconds of a token or a prompt on GPUs, and of their host
- routing.py: hit rates from a router's choices
- cards.py: finds a GPU's name in cards.json, which has published figures
- machine_speeds.py: the speeds of a machine and of its GPUs
- measuring.py: measures this machine, and remembers the speeds in machine.json
- compute_speed.py, disk_speed.py, bandwidth.py, gpu_speed.py: the single measurements
- torch_threads.py: how many threads torch uses
"""
