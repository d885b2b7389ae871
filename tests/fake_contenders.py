"""Contenders for `test_peers`, which their processes find here: quick to import, and nothing to compute."""

import os

import numpy as np

from experiments.peers.job import Ready


def answering(job):
    """Answers what its images say: pixel 0 of an image is its label, pixel 1 its exit."""
    return Ready(_answer, job.batches, settings='as the images say')


def without_exits(job):
    """Answers everything at the last exit."""
    return Ready(lambda images: (np.full(len(images), 9), None), job.batches)


def late(job):
    """Lets every image out at the second exit, though a first one is there."""
    return Ready(lambda images: (np.full(len(images), 9), np.ones(len(images), int)), job.batches)


def wrong(job):
    """Answers with other labels."""
    return Ready(lambda images: (_answer(images)[0] + 1, _answer(images)[1]), job.batches)


def missing(job):
    """Cannot be had."""
    raise ModuleNotFoundError("No module named 'torch'\nand a second line")


def dies_at_start(job):
    """Takes its process with it."""
    os._exit(1)


def dies_later(job):
    """Dies in a turn: after the answers and the two passes that say how long a pass takes, each of two calls."""
    calls = []

    def answer(images):
        calls.append(images)
        if len(calls) > 6:
            os._exit(1)
        return _answer(images)

    return Ready(answer, job.batches)


def _answer(images):
    return images[:, 0, 0, 0].astype(int), images[:, 0, 1, 0].astype(int)
