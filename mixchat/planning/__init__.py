"""What fits where, how fast it will be, and how fast this machine is.

- plan.py: what a model will do on this machine
- fitting.py: what a model asks of memory, for planning and for loading
- expectation.py: how fast it will be
- cost.py: what a token costs: a pure model of time
- simulate.py: replays a routing trace for caches of any size
- thread_count.py: how many threads compute
- speeds.py: how fast this machine is, measured once
- calibration.py: the file that remembers it
- measure.py, disk_speed.py, probe.py: the measurements
"""
