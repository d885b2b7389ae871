"""The main job behind `experiments.main`: data, networks, trainings, thresholds, clocks, records."""
