"""Plans a model on this machine: what fits where, and how fast it will be.

The data goes one way: `Machine` (the hardware) and the options give a `Fit`; the fit and a
`Measurement` give a `MachinePlan`.

- plan.py: the plan of a model on a machine
- hardware.py: the machine that a plan is for: this one, or one that a person tells about
- fitting.py: where a model goes, for planning and for loading
- expectation.py: how fast it will be: a model of time
- prompts.py: how long prompts take
- prediction.py: the same for a model that is loaded
- worker_split.py: how fast it will be once workers hold experts, too
- loads.py: what each of several holders of experts computes
- hit_rate.py: the hit rate that a cache of any size will have
- calibration.py: the figures that are measured
- machine_speed.py: measures this machine, and remembers that in machine.json
- compute_speed.py, disk_speed.py: the measurements
- torch_threads.py: how many threads torch uses
"""
