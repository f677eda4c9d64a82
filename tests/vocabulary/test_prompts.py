from vild.vocabulary.prompts import PROMPT_SETS, article, clean_name, fill, vild_templates


def test_there_are_63_different_templates():
    assert len(set(vild_templates())) == len(vild_templates()) == 63


def test_templates_name_the_thing_once():
    for template in vild_templates():
        assert template.count("{}") == 1


def test_fill_as_the_released_code_does():
    texts = fill(PROMPT_SETS["vild"], "Aerosol_can/spray.")
    assert "There is an aerosol can or spray in the scene." in texts
    assert "itap of my aerosol can or spray." in texts
    assert "This is a bad photo of an aerosol can or spray." in texts
    assert "This is the embroidered aerosol can or spray." in texts
    assert not any("{" in text for text in texts)
    assert not any(text.startswith(("a ", "an ", "the ")) for text in texts)


def test_articles_and_clean_up():
    assert [article(n) for n in ("apple", "umbrella", "hat")] == ["an", "an", "a"]
    assert clean_name("Bow_(decorative)/ribbon.") == "bow (decorative) or ribbon"


def test_a_single_prompt_is_left_as_it_is():
    assert fill(PROMPT_SETS["photo"], "sun") == ["a photo of a sun."]
    assert fill(PROMPT_SETS["name"], "sun") == ["sun"]
