"""Engines that measure ops and swapped modules. Runs write every figure; tables and plots are made from their records.

memory.py counts bytes, FLOPs and launches without a GPU; ops.py times; gpu.py does all of it on a machine with a GPU;
report.py makes the tables and plots.
"""
