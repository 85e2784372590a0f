"""A job's samples given to the Python API, batch by batch."""

from __future__ import annotations

import numpy as np
from samples import padded

from qkov_dist import FisherCollector


def collected(model, job, side: str = "right", **options) -> FisherCollector:
    """Collect in the job's own Fisher steps."""
    collector = FisherCollector(decay=job.decay, batch_tokens=24, **options)
    num_a = len(job.a)
    for step in job.steps:
        task, samples = (
            ("math", [job.a[n] for n in step])
            if step[0] < num_a
            else (
                "code",
                [job.b[n - num_a] for n in step],
            )
        )
        losses = collector.collect_fisher(model, padded(samples, side), task=task, mode=job.estimator)
        assert losses.shape == (len(samples),)
        assert np.isfinite(losses).all()
    return collector
