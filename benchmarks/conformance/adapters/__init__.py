"""One file a library: functions `(leader, follower, x, y, *, optimizer, steps)`, written as its documentation says.

Each returns the derivative of leader(x, y*(x)) as a pytree like x. A name says no more than the library's own does.
"""
