"""A job server after Gearman, on ZeroMQ: clients submit jobs, workers grab them, equal ones merge.

It can be installed and understood without ``dmap``. ``protocol`` is the wire, ``state`` thinks,
``server`` acts.
"""
