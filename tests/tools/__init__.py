"""What only this project's tests and benchmarks need: interpreters, compilers, fuzzing."""
