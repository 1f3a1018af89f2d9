"""The treatments that an instrument names: each is in the catalogue, named once, and what can be applied is named somewhere."""

import pytest

from surefoot import catalog

NAMED = {entry.slug: catalog.make_instrument(entry.slug).fix for entry in catalog.instruments()}

# Methods that promise something that no instrument of ours measures: training time, parameters, size, natural changes of pictures.
UNMEASURED = {"tract", "pissa", "random_pruning", "natra"}


@pytest.mark.parametrize("slug", [slug for slug, fix in NAMED.items() if fix])
def test_every_named_treatment_is_in_the_catalogue(slug):
    fix = NAMED[slug]
    assert len(set(fix)) == len(fix)
    assert {catalog.find(name).slug for name in fix} == set(fix)  # find raises for an unknown name


def test_every_treatment_that_promises_a_measured_number_is_named():
    treatments = {method.slug for method in catalog.methods() if method.treatment}
    assert treatments - UNMEASURED <= {name for fix in NAMED.values() for name in fix}
    assert treatments >= UNMEASURED
