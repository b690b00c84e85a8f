"""Studies of small models on synthetic tasks: all learning rates and seeds of a model train at once, in one program."""
