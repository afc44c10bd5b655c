"""Tools of this project's tests and benchmarks: interpreters, compilation, races, fuzzing."""
