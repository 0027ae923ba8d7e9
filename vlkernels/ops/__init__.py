"""One folder an op: reference.py is its specification, triton.py and cuda.py its kernels, cases.py its shapes."""
