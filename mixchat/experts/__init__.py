"""Holds experts, moves them between memories, and computes them.

A slot is memory for one expert. A tier is a kind of memory, such as a GPU's, RAM or the disk. The
cache chooses an expert's slot. A queue brings the most urgent experts first. The store has the
memory.

- holder.py: the interface through which the model uses experts
- dispatcher.py: sends each layer's rows to the holders of its experts, and combines the outputs
- layer_rows.py: the rows of each expert, and their outputs
- sharing.py: divides the experts, and the work of a layer, among this machine and workers
- compute.py: computes experts in RAM
- tier.py: holds experts in one kind of memory
- cache.py: slots, eviction policies, and counts of uses
- prefetch.py: predicts which experts the next layers need
- load_queue.py: loads experts in several threads, the most urgent first
- store.py: slots in RAM, and the pieces in which an expert is read
- gpu_experts.py: computes experts on GPUs, and lets RAM's holder compute the others
- vram.py: the tier in a GPU's memory, and what brings experts there
- arena.py: the memory of a GPU's slots, in large pieces
- most_used.py: chooses the experts that a GPU holds, by their uses
- placement.py: how many experts fit in each memory
- memory.py: follows how much memory is free
- recording_runner.py: records the routing, and the inputs of experts
- workers/: experts on other machines, and both ends of the connection
"""
