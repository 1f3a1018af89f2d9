"""What classes say of methods by name is in the catalogue: the treatments an instrument points to, the methods a treatment excludes."""

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


def test_every_excluded_method_is_in_the_catalogue():
    for method in catalog.methods():
        if method.treatment:
            for other, reason in catalog.make_treatment(method.slug).excludes.items():
                assert catalog.find(other).slug == other != method.slug
                assert reason.endswith("."), f"{method.slug}: {reason}"


@pytest.mark.parametrize("method", [m for m in catalog.methods() if catalog.works(m)], ids=lambda m: m.slug)
def test_the_headline_is_one_of_the_claims_on_trial(method):
    found = catalog.evidence(method)
    assert found is not None and method.headline in [claim["claim"] for claim in found["claims"]]
