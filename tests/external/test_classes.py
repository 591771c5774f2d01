"""Which columns of a table are classes of a model, and what is said of the others."""

from __future__ import annotations

import pytest

from cxr_fast.data.near_names import nearest_name
from cxr_fast.errors import InputError
from cxr_fast.external.classes import describe_classes, match_classes

OURS = ["Effusion", "Edema", "Pleural_Thickening", "A=B"]


def test_classes_match_by_name_in_the_order_of_the_model() -> None:
    found = match_classes(["Edema", "Rib fracture", "Effusion"], OURS, (), "site")
    assert found.names == found.columns == ("Effusion", "Edema")
    assert found.lacking == ("Pleural_Thickening", "A=B")
    assert found.unknown == ("Rib fracture",)
    lines = describe_classes(found, "site")
    assert lines[0] == (
        "2 of 4 classes of the model have no column in site and no figures: 'Pleural_Thickening', 'A=B'"
    )
    assert lines[1] == "1 column of site is no class of the model: 'Rib fracture'"


def test_renamed_columns_and_equals_signs() -> None:
    found = match_classes(["x=y", "Pleural effusion"], OURS, ("x=y=A=B", "Pleural effusion=Effusion"), "site")
    assert found.names == ("Effusion", "A=B")
    assert found.columns == ("Pleural effusion", "x=y")
    assert found.unknown == ()


@pytest.mark.parametrize(
    ("theirs", "renamed", "said"),
    [
        (["Edema"], ["Effusion"], "--map Effusion: write THEIRS=OURS"),
        (["Oedema"], ["Odema=Edema"], "--map Odema=Edema: site has no class column 'Odema'; nearest: 'Oedema'."),
        (["Oedema"], ["Oedema=Edemas"], "the model has no class 'Edemas'; nearest: 'Edema'."),
        (["Oedema"], ["Oedema=Quux"], "the model has no class 'Quux'; it has 'Effusion', 'Edema'"),
        (["Edema", "Oedema"], ["Oedema=Edema"], "class 'Edema' has the column 'Edema' of site already"),
        (["Pleural thickening", "q"], [], 'nearest: --map "Pleural thickening=Pleural_Thickening".'),
        (["q"], [], "site has none of the 4 classes of the model ('Effusion', 'Edema', 'Pleural_Thickening', 'A=B')"),
    ],
)
def test_what_does_not_fit_is_one_line(theirs: list[str], renamed: list[str], said: str) -> None:
    with pytest.raises(InputError) as error:
        match_classes(theirs, OURS, renamed, "site")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_near_names() -> None:
    assert nearest_name("PLEURAL-EFFUSION", OURS) == "Effusion"
    assert nearest_name("pleural thickening", OURS) == "Pleural_Thickening"
    assert nearest_name("Oedema", OURS) == "Edema"
    assert nearest_name("Fracture", OURS) == ""
    assert nearest_name("", OURS) == ""
