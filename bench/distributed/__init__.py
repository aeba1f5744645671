"""A step of the tables on several processes: bytes that leave a rank, and times, of every layout in one run.

cli.py       options, the processes, rows and the table
ranks.py     what every process does: make each layout, check it, count its bytes, time it in turns
layouts.py   the layouts: this package's, TorchRec's, and what one would write instead
counting.py  bytes at the collective operators of torch, and those of the loopback interface
"""
