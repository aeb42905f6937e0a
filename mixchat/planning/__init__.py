"""Predicts which part of a model fits into each memory, and how fast the model will be.

`Machine` (the hardware) and the options give a `MemoryPlan`. With a `Measurement` it gives a
`MachinePlan`.

- plan.py: the plan of one model or of all known ones, and the predicted speed of a loaded one
- hardware.py: the machine that a plan is for, this one or one that a person describes
- fitting.py: places a model in memory, for a plan and for loading
- faster_device.py: places it on the GPUs, or on the CPU if that is faster
- expectation.py: how fast it decodes and reads prompts
- gpu_cost.py: the seconds of a token and of a prompt on GPUs
- routing.py: hit rates from a router's choices
- cards.py: finds a GPU's name in cards.json, which has published figures
- machine_speeds.py, gpu_speeds.py: the speeds of a machine and of a GPU
- measuring.py: measures this machine, and remembers the figures in machine.json
- compute_speed.py, disk_speed.py, gpu_measuring.py, bandwidth.py: the single measurements
- torch_threads.py: how many threads torch uses
"""
