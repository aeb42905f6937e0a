"""Predicts which part of a model fits into each memory, and how fast the model will be.

`Machine` (the hardware) and the options give a `MemoryPlan`. With a `Measurement` it gives a
`MachinePlan`.

- plan.py: the plan of one model or of all known ones, and the predicted speed of a loaded one
- hardware.py: the machine that a plan is for, this one or one that a person describes
- fitting.py: places a model in memory, for a plan and for loading
- expectation.py: how fast it decodes and reads prompts
- routing.py: hit rates, and the share of the busiest GPU, from a router's choices
- machine_speeds.py: the measured speeds of a machine
- measuring.py: measures this machine, and remembers the figures in machine.json
- compute_speed.py, disk_speed.py: the single measurements
- torch_threads.py: how many threads torch uses
"""
