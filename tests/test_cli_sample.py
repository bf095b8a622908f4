"""The main job as a stranger types it, to its end: minutes on two cores, so not in the default run (`-m slow`)."""

import json

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sample_set_is_learned(run_process, seed):
    """More than the bootstrap intervals better than random weights and raw pixels, linear and kNN."""
    done = run_process("pretrain", "simclr", "--seed", str(seed), "--json", OMP_NUM_THREADS="", patience=1800)
    assert done.code == 0, done.err
    beats = json.loads(done.out)["probe"]["beats"]
    assert beats.keys() == {"linear", "knn"}
    for metric, baselines in beats.items():
        assert baselines == {"random weights": True, "raw pixels": True, "chance": True}, metric


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rotation_beats_random_weights(run_process, seed):
    """Its output, beyond the intervals; its best stage beats raw pixels and every stage of random weights too."""
    done = run_process("pretrain", "rotation", "--seed", str(seed), "--json", OMP_NUM_THREADS="", patience=2400)
    assert done.code == 0, done.err
    report = json.loads(done.out)["probe"]
    for metric in ("linear", "knn"):
        assert report["beats"][metric]["random weights"] and report["beats"][metric]["chance"], metric
        assert all(report["best_beats"][metric].values()), metric
