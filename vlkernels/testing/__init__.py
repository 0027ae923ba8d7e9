"""What tests and benchmarks share: cases, the correctness rule, meters, the ahead-of-time checker, goldens."""
