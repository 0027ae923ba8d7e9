"""Bridges to other libraries: upstream checkpoint names. Those libraries are imported only inside functions."""
