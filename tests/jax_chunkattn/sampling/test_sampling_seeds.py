"""Seeds of samples and forks: the same in every run, and none like another but by chance."""

from __future__ import annotations

from jax_chunkattn.sampling import SamplingParams, each_sample, fork_seed, sample_seed

LARGEST = 2**32 - 1


def test_the_seed_of_a_fork_is_the_same_on_every_machine():
    seeds = [fork_seed(0, 0), fork_seed(0, 1), fork_seed(1, 0), fork_seed(LARGEST, 7)]
    assert seeds == [1222067678, 2004527422, 2587066976, 882984824]


def test_the_seeds_of_samples_are_the_same_on_every_machine():
    """The first has the request's own: a single answer is the first of several."""
    seeds = [sample_seed(0, 1), sample_seed(0, 2), sample_seed(1, 1), sample_seed(LARGEST, 7)]
    assert seeds == [63013132, 470925596, 934732711, 3434286760]
    params = SamplingParams(7, 1.0, seed=LARGEST, n=3)
    expected = [LARGEST, sample_seed(LARGEST, 1), sample_seed(LARGEST, 2)]
    assert each_sample(params) == [SamplingParams(7, 1.0, seed=seed) for seed in expected]
    assert each_sample(SamplingParams(seed=5)) == [SamplingParams(seed=5)]


def test_without_a_seed_each_request_draws_one_of_its_own():
    drawn = [each_sample(SamplingParams(n=2)) for _ in range(20)]
    assert len({params.seed for samples in drawn for params in samples}) == 40
    for first, second in drawn:
        assert first.seed is not None
        assert second.seed == sample_seed(first.seed, 1)


def test_seeds_meet_no_others_but_by_chance():
    """Of 27,136 seeds, of steps of a rollout, their samples, and two generations of forks of the
    steps, 0.09 pairs should be equal."""
    steps = range(1280)
    samples = [one.seed for step in steps for one in each_sample(SamplingParams(seed=step, n=9))]
    forks = [fork_seed(seed, number) for seed in steps for number in range(4)]
    further = [fork_seed(seed, number) for seed in forks for number in range(2)]
    seeds = [*samples, *forks, *further]
    assert len(set(seeds)) == len(seeds) == 1280 * (9 + 4 + 8)
    assert all(seed is not None and 0 <= seed <= LARGEST for seed in seeds)
