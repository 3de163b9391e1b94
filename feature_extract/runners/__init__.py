"""Who does the work items: processes of this machine, processes of a Ray cluster, or one share of them at a time."""
