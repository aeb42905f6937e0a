"""Native code for the CPU: written by Python, compiled by LLVM on the machine that runs it."""
