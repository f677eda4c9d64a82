"""Images unlike the known ones are told from the known ones."""

from dataclasses import asdict

import torch

from vild.modeling.familiarity import KNOWN, Familiarity, image_statistics


def test_statistics_are_each_channels_mean_and_spread():
    maps = [torch.randn(3, 4, 8, 6), torch.randn(3, 5, 2, 2)]
    found = image_statistics(maps)
    assert found.shape == (3, 18)
    torch.testing.assert_close(found[1, 2], maps[0][1, 2].mean())
    torch.testing.assert_close(found[1, 4 + 2], maps[0][1, 2].flatten().std())
    torch.testing.assert_close(found[2, 8 + 3], maps[1][2, 3].mean())


def test_known_images_lie_within_the_limit_and_others_do_not():
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(1000, 20, generator=generator) * 3 + 5
    found = Familiarity.fit(known)
    assert abs((found.distance(known) <= 1).float().mean() - KNOWN) < 0.002
    assert (found.distance(torch.randn(100, 20, generator=generator) * 3 + 5) <= 1).float().mean() > 0.9
    assert (found.distance(torch.randn(100, 20, generator=generator) * 30) > 1).float().mean() > 0.9


def test_images_that_are_all_alike_and_maps_of_one_position_give_numbers_that_can_be_loaded():
    maps = torch.randn(1, 4, 1, 1).expand(50, -1, -1, -1)
    known = image_statistics([maps])
    assert known[:, :4].equal(maps[:, :, 0, 0]) and (known[:, 4:] == 0).all()
    found = Familiarity.fit(known)
    assert Familiarity.from_state(asdict(found), 8) == found
    assert (found.distance(known) <= 1).all() and (found.distance(known + 0.1) > 1).all()


def test_a_constant_statistic_divides_by_nothing():
    known = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    known[:, 1] = 7
    assert Familiarity.fit(known).distance(known).isfinite().all()
