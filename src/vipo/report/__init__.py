"""A run directory to something a person can look at: pictures, maps, one self-contained page, a table of runs.

Nothing here trains or needs a model; a run that is still going, or was killed, can be read at any time.
"""
