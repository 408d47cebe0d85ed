"""Seeds of samples and forks: the same in every run, and none like another but by chance."""

from __future__ import annotations

from jax_chunkattn.sampling import SamplingParams, each_sample, fork_seed

LARGEST = 2**32 - 1


def test_the_seed_of_a_fork_is_the_same_on_every_machine():
    seeds = [fork_seed(0, 0), fork_seed(0, 1), fork_seed(1, 0), fork_seed(LARGEST, 7)]
    assert seeds == [1222067678, 2004527422, 2587066976, 882984824]


def test_seeds_of_samples_count_up_and_wrap():
    params = SamplingParams(7, 1.0, seed=LARGEST, n=3)
    assert each_sample(params) == [SamplingParams(7, 1.0, seed=seed) for seed in (LARGEST, 0, 1)]


def test_seeds_of_forks_meet_no_others_but_by_chance():
    """Of 16,640 seeds, samples and two generations of forks, 0.03 pairs should be equal."""
    samples = range(1280)
    forks = [fork_seed(seed, number) for seed in samples for number in range(4)]
    further = [fork_seed(seed, number) for seed in forks for number in range(2)]
    seeds = [*samples, *forks, *further]
    assert len(set(seeds)) == len(seeds) == 16_640
    assert all(0 <= seed <= LARGEST for seed in seeds)
