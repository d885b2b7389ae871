"""A service over HTTP whose thresholds follow the load, in one process or on Ray, and labelling of large data sets."""
