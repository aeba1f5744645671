"""The encoder on several devices.

torchrec.py  to TorchRec's sharded tables, and back
"""
