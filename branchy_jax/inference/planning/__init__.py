"""The planner: measure a network, try executors, bind the fastest one."""
