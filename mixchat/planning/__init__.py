"""Plans a model on this machine, with what fits into its memory and how fast it will be.

`Machine` (the hardware) and the options give a `MemoryPlan`. With a `Measurement` it gives a
`MachinePlan`.

- plan.py: the plan of one model or of all known ones, and the predicted speed of a loaded one
- hardware.py: the machine that a plan is for, this one or one that a person describes
- fitting.py: the places of a model in memory, for planning and for loading
- expectation.py: how fast it decodes
- prompts.py: how long prompts take
- worker_split.py: how fast it decodes once workers hold experts, too
- routing.py: hit rates and loads, from a router's choices
- machine_speeds.py: the figures that are measured
- measuring.py: measures this machine, and remembers the figures in machine.json
- compute_speed.py, disk_speed.py: the single measurements
- torch_threads.py: how many threads torch uses
"""
