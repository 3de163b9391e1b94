"""A package by name, since torch-fidelity installs one called tests, too: worker processes must find this one."""
