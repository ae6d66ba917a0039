"""prompt.json: what is read, what is refused and how, what is held out, what is computed of it."""

import json
import math
import random

import numpy as np
import pytest
import torch

from cldm.conversion import fit_statistics
from cldm.dataset import (
    ControlDataset,
    TrainingData,
    TrainingOrder,
    find_subjects,
    hold_out,
    iterate_rows,
    parse_control,
    read_control_names,
    read_data,
    read_rows,
    recognize_prompt,
    split_rows,
)
from ldm.pictures import fit_picture, load_picture, pictures_to_tensor, tensor_to_pictures
from ldm.settings import InputError


def test_only_named_numbers_go_round_as_a_control_says():
    own = [5.0, None]
    for names, periods, expected in (
        (None, None, [None, None]),
        (["hour", "size"], None, own),  # as pairs, which are cut by formula
        (["hour", "size"], [6.0, None], [6.0, None]),
    ):
        assert TrainingData([], [], np.zeros((1, 2)), names, names, periods).periods_beside(own) == expected


@pytest.mark.parametrize(
    "source, expected",
    [
        (5, (5.0,)),
        (-3.5, (-3.5,)),
        ("-3.5", (-3.5,)),
        (" 1e-2 ", (0.01,)),
        ([5, 0.8], (5.0, 0.8)),
        (["5", 0.8, "-1"], (5.0, 0.8, -1.0)),
    ],
)
def test_source_is_a_number_a_text_or_a_list(write_dataset, source, expected):
    (row,) = read_rows(write_dataset([source]) / "prompt.json")
    assert row.control == expected
    assert row.prompt == "a square" and row.target.is_file()


NO_NUMBER = '"source" must be a finite number or a list of them, got '
TOO_LONG = '"source" must have no more digits than 64 bits hold'
BAD_ROWS = [  # a line, or what is other than in a good row (...: a missing key), and what is said of it
    *(
        ({"source": source}, NO_NUMBER)
        for source in ("abc", "", "nan", "-inf", True, [], {}, [1, None], [[1]], ["a", 2], "1_0", ["1_0"])
    ),
    *(({"source": source}, NO_NUMBER) for source in (math.nan, math.inf, [False], 10**400)),
    *(({"source": source}, TOO_LONG) for source in (10**16 + 1, str(2**53 + 1))),
    *(({key: ...}, f'no "{key}"') for key in ("source", "target", "prompt")),
    *(({"target": 5}, '"target" must be a text'), ({"prompt": ["a"]}, '"prompt" must be a text')),
    ({"prompt": "\ud83d"}, '"prompt" must be a text'),
    ({"source": [1, 2]}, '"source" has 2 numbers, the first row has 1'),
    *(({"time": time}, '"time" must be a time in ISO 8601') for time in ("noon", "2019-02-30", 1561125900, None)),
    ({"time": "2019-06-21"}, 'has a "time", unlike the first row'),
    *(('{"source": 1,', "not JSON"), ("source: 1", "not JSON"), ("[" * 100_000, "not JSON")),
    ('{"source": ' + "9" * 5000 + "}", ""),
    ('{"source": 1, "source": 2, "target": "a.png", "prompt": ""}', "it has a key twice"),
    *(("[1, 2]", r"expected a JSON object, got \[1, 2\]"), ("5", "expected a JSON object, got 5")),
]


def add_row(file, bad):
    """Add a line to a prompt.json after an empty one, which counts but is no row; bad: as in BAD_ROWS."""
    if isinstance(bad, dict):
        row = json.loads(file.read_text().splitlines()[0]) | bad
        bad = json.dumps({key: value for key, value in row.items() if value is not ...})
    file.write_text(f"{file.read_text()}\n{bad}\n")


@pytest.mark.parametrize("bad, message", BAD_ROWS, ids=[f"{str(bad)[:30]}" for bad, _ in BAD_ROWS])
def test_bad_row_is_named_with_file_and_line(write_dataset, bad, message):
    file = write_dataset([1, 2]) / "prompt.json"
    add_row(file, bad)
    with pytest.raises(InputError, match=f"prompt.json line 4: .*{message}"):
        read_rows(file)


@pytest.mark.parametrize("key", ["target", "reference"])
@pytest.mark.parametrize(
    "name, message",
    [
        ("none.png", "no such file"),
        (".", "a folder, expected a picture"),
        *((name, "(damaged|not a picture)") for name in ("empty", "text", "cut")),
    ],
)
def test_bad_picture_is_named_with_file_and_line(write_dataset, base, key, name, message):
    """When it is come to: a row's pictures are read once."""
    file = write_dataset([1]) / "prompt.json"
    for bad, content in {"empty": b"", "text": b"no picture"}.items():
        (file.parent / bad).write_bytes(content)
    (file.parent / "cut").write_bytes((file.parent / "prompt.json_0.png").read_bytes()[:1000])
    if key == "reference":
        file.write_text(file.read_text().replace("}", ', "reference": "prompt.json_0.png"}'))
    add_row(file, {key: name})
    rows = read_rows(file)
    with pytest.raises(InputError, match=f'prompt.json line 3: "{key}" .*{message}'):
        ControlDataset(rows, base, 32)


def test_times_have_an_offset_or_none_has(write_dataset):
    file = write_dataset([1]) / "prompt.json"
    file.write_text(file.read_text().replace("}", ', "time": "2019-06-21T14:05:00Z"}'))
    add_row(file, {"time": "20190621T160500+02"})
    assert [row.time[-3:] for row in read_rows(file)] == ["00Z", "+02"]
    for time, message in (("2019-06-21", "all need an offset"), (..., 'has no "time"')):
        file.write_text(file.read_text().splitlines()[0] + "\n")
        add_row(file, {"time": time})
        with pytest.raises(InputError, match=f"line 3: .*{message}"):
            read_rows(file)


def test_whole_numbers_that_a_float_holds_are_kept():
    assert parse_control([2**53, -(2**60), "1e300", 1e300]) == (2.0**53, -(2.0**60), 1e300, 1e300)


def test_large_numbers_keep_their_digits(write_dataset, base, make_model):
    """Unix times and dates, which float32 would make one, up to the hint."""
    times = [[1700000000 + i, 20240101 + i] for i in range(3)]
    rows = read_rows(write_dataset(times, size=32) / "prompt.json")
    batch = torch.utils.data.default_collate(list(ControlDataset(rows, base, 32)))
    assert batch["control"].dtype == torch.float64 and batch["control"].tolist() == times
    control_net = make_model(2, fresh=True).control_net
    fit_statistics(control_net, [row.control for row in rows], None, None)
    normal = control_net.normalize(batch["control"])
    assert normal.dtype == torch.float32
    torch.testing.assert_close(normal, torch.tensor([[-1.0], [0.0], [1.0]]).expand(3, 2) * 1.5**0.5)


@pytest.mark.parametrize("start, end", [("\ufeff", "\n"), ("", "\r\n")], ids=["byte order mark", "Windows"])
def test_rows_end_at_newlines_alone(write_dataset, start, end):
    folder = write_dataset([1, 2])
    rows = [json.loads(line) | {"prompt": "a\u2028b\x85c"} for line in (folder / "prompt.json").open()]
    text = start + "".join(json.dumps(row, ensure_ascii=False) + end for row in rows)
    (folder / "prompt.json").write_bytes(text.encode())
    assert [row.prompt for row in read_rows(folder / "prompt.json")] == ["a\u2028b\x85c"] * 2


def test_validation_of_another_length_than_training(write_dataset):
    write_dataset([[1, 2], [3, 4]])
    folder = write_dataset([5], file="validation.json")
    with pytest.raises(InputError, match="validation.json"):
        split_rows(folder)


@pytest.mark.parametrize("content, message", [(None, "no such file"), ("", "no rows"), (" \n\n", "no rows")])
def test_missing_or_empty_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "prompt.json").write_text(content)
    with pytest.raises(InputError, match=f"prompt.json: {message}"):
        split_rows(tmp_path)


def test_a_file_in_place_of_its_folder_is_named(write_dataset):
    file = write_dataset([1, 2]) / "prompt.json"
    with pytest.raises(InputError, match="prompt.json: a file, expected the folder that it lies in"):
        read_data(file)


def test_keys_of_a_row_may_be_more_but_not_misspelt(write_dataset):
    file = write_dataset([1, 2]) / "prompt.json"
    text = file.read_text()
    file.write_text(text.replace('"target"', '"camera": "left", "targets": 1, "target"'))
    assert len(read_rows(file)) == 2
    for key in ("refrence", "REFERENCE", "ref"):
        file.write_text(text.replace('"target"', f'"{key}": "a.png", "target"'))
        with pytest.raises(InputError, match=f'line 1: unknown key "{key}"'):
            read_rows(file)


def test_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "prompt.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="prompt.json: cannot be read as UTF-8 text"):
        read_rows(tmp_path / "prompt.json")


def controls(rows):
    return [row.control for row in rows]


def test_validation_file_is_used_where_there_is_one(write_dataset):
    write_dataset(list(range(20)))
    folder = write_dataset([0.5, 2.5], file="validation.json")
    train, validation = split_rows(folder)
    assert len(train) == 20 and controls(validation) == [(0.5,), (2.5,)]


@pytest.mark.parametrize("count", [5, 6, 7, 11, 30])
def test_held_out_controls_are_never_trained_and_never_the_extremes(write_dataset, count):
    folder = write_dataset(list(range(count)) * 2)
    train, validation = split_rows(folder)
    assert validation and len(train) + len(validation) == 2 * count
    assert not set(controls(train)) & set(controls(validation))
    assert {(0.0,), (count - 1.0,)} <= set(controls(train))
    assert len(set(controls(validation))) <= max(1, count // 10 + 1)


@pytest.mark.parametrize("subjects, count, values", [(1, 30, 3), (6, 10, 5), (40, 1, 4), (3, 4, 0)])
def test_held_out_controls_are_spread_over_the_range(subjects, count, values):
    """One in ten of every subject's, at different places for different ones."""
    pairs = [(f"thing {k}", (float(i if count > 1 else k),)) for k in range(subjects) for i in range(count)]
    chosen = sorted(control for _, (control,) in held_out(pairs))
    assert len(chosen) == (0 if values == 0 else max(1, subjects * count // 10))
    assert len(set(chosen)) >= values
    if values:
        span = max(control for _, (control,) in pairs)
        assert chosen[-1] - chosen[0] > 0.5 * span and chosen[0] > 0 and chosen[-1] < span


def test_held_out_controls_of_several_numbers_leave_the_range_whole():
    generator = torch.Generator().manual_seed(0)
    pairs = [("", tuple(row)) for row in torch.rand(100, 3, generator=generator).tolist()]
    kept = torch.tensor([control for _, control in set(pairs) - held_out(pairs)])
    everything = torch.tensor([control for _, control in pairs])
    assert len(kept) == 90 and torch.equal(kept.amin(0), everything.amin(0))
    assert torch.equal(kept.amax(0), everything.amax(0))


def test_order_of_training_depends_on_the_seed_alone():
    """Every row once before any comes again; a killed run goes on; two processes share what one would take."""

    def take(rows=5, length=12, seed=0, **place):
        return list(TrainingOrder(rows, length, seed, **place))

    whole = take()
    assert sorted(whole[:5]) == sorted(whole[5:10]) == list(range(5)) and whole[:5] != whole[5:10]
    assert whole == take() and whole[:8] == take(length=8) and whole[7:] == take(first=7) and whole != take(seed=1)
    halves = [take(length=6, rank=rank, processes=2) for rank in (0, 1)]
    assert [n for both in zip(*halves) for n in both] == whole
    assert take(rows=None, first=10) == [10, 11] and len(TrainingOrder(5, 12, 0)) == 12


def held_out(pairs, periods=()):
    """pairs: (prompt, control) of every row. Returns: the set of those that are held out."""
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    numbers = np.array([prompts.index(prompt) for prompt, _ in pairs])
    return {pairs[i] for i in hold_out(np.array([control for _, control in pairs]), numbers, periods).nonzero()[0]}


def test_few_distinct_controls_give_no_validation(write_dataset):
    train, validation = split_rows(write_dataset([0, 1, 2, 3] * 3))
    assert len(train) == 12 and not validation


@pytest.fixture
def dataset(write_dataset, base):
    write_dataset([1, 2, 3], size=32, prompt="a cup")
    folder = write_dataset([[4], "5"], file="more.json", size=32, prompt="a cat")
    rows = [*read_rows(folder / "prompt.json"), *read_rows(folder / "more.json")]
    return ControlDataset(rows, base, 32, batch_size=2)


def test_items_are_what_the_base_makes_of_the_row(dataset, base, capsys):
    assert len(dataset) == 5
    for i, (row, item) in enumerate(zip(dataset.rows, dataset)):
        assert item["row"] == i
        picture = pictures_to_tensor([load_picture(row.target)])
        torch.testing.assert_close(item["latents"], base.encode(picture)[0])
        torch.testing.assert_close(item["embeddings"], base.embed([row.prompt])[0])
        torch.testing.assert_close(item["empty"], base.embed([""])[0])
        assert item["control"].tolist() == list(row.control)
        assert not any(value.requires_grad for value in item.values())
    assert dataset.rows[0].prompt == "a cup" and dataset.rows[4].prompt == "a cat"
    assert "resized" not in capsys.readouterr().out


def test_pictures_of_another_size_are_resized_and_said_to_be(write_dataset, base, capsys):
    rows = read_rows(write_dataset([1, 2], size=40) / "prompt.json")
    dataset = ControlDataset(rows, base, 32)
    assert "pictures of 40 x 40 resized to 32 x 32" in capsys.readouterr().out
    picture = pictures_to_tensor([fit_picture(load_picture(rows[1].target), 32)])
    torch.testing.assert_close(dataset[1]["latents"], base.encode(picture)[0])


def test_picture_to_tensor_and_back(picture):
    original = load_picture(picture)
    tensor = pictures_to_tensor([original])
    assert tensor.shape == (1, 3, 32, 32) and -1 <= tensor.min() < -0.9 and 0.9 < tensor.max() <= 1
    red, green, blue = original.getpixel((3, 5))
    assert (127.5 * (tensor[0, :, 5, 3] + 1)).round().tolist() == [red, green, blue]
    assert tensor_to_pictures(tensor)[0].tobytes() == original.tobytes()


def test_controls_have_the_names_of_their_file(write_dataset):
    folder = write_dataset([[1, 2]])
    assert read_control_names(folder, 2) == (None, None, None, None)
    (folder / "controls.yaml").write_text("names: [angle, zoom]\nunits: [degrees, '']\n")
    assert read_control_names(folder, 2) == (["angle", "zoom"], ["degrees", ""], [None, None], None)
    with pytest.raises(InputError, match='controls.yaml: "names" must be a list of length 3'):
        read_control_names(folder, 3)
    (folder / "controls.yaml").write_text("names: [angle, angle]\nunits: [degrees, '']\n")
    with pytest.raises(InputError, match="controls.yaml: expected 2 different names"):
        read_control_names(folder, 2)
    (folder / "controls.yaml").write_text("names: [2024-05-01, '${seed}']\nunits: ['1e-3', '']\n")
    assert read_control_names(folder, 2) == (["2024-05-01", "${seed}"], ["1e-3", ""], [None, None], None)
    for text in (
        "names:\nunits: [a, b]",
        "names: ab\nunits: [a, b]",
        "names: [yes, 007]\nunits: [a, b]",
        "names: [a, b]",
    ):
        (folder / "controls.yaml").write_text(text)
        with pytest.raises(InputError, match="controls.yaml: .*a list of length 2, each a text, in quotes"):
            read_control_names(folder, 2)


def test_periodic_numbers_are_brought_into_one_turn(write_dataset, capsys):
    folder = write_dataset([[0, 5], [9.9, 6], [10, 7], [-0.5, 25]])
    (folder / "controls.yaml").write_text("names: [hour, size]\nunits: ['', '']\nperiods: [10, null]\n")
    data = read_data(folder)
    assert data.periods == [10, None] and data.controls.tolist() == [[0, 5], [9.9, 6], [0, 7], [9.5, 25]]
    told = capsys.readouterr().out
    assert "2 of 4 rows" in told and "not in the unit of source" in told
    (folder / "controls.yaml").write_text("names: [hour, size]\nunits: ['', '']\nperiod: [10, null]\n")
    with pytest.raises(InputError, match=r'controls.yaml: unknown key "period" \(did you mean "periods"\?\)'):
        read_data(folder)
    for text in ("10", "[0, null]", "[10]"):
        (folder / "controls.yaml").write_text(f"names: [hour, size]\nunits: ['', '']\nperiods: {text}\n")
        with pytest.raises(InputError, match='controls.yaml: "periods" must be a list of length 2'):
            read_data(folder)


def test_names_of_numbers_stand_in_one_file_alone(write_dataset):
    folder, text = write_dataset([1, 2]), "names: [hour]\nunits: [h]\ncircular: [12]\n"
    (folder / "controls.yaml").write_text(text)
    with pytest.raises(InputError, match='controls.yaml: unknown key "circular"'):
        read_data(folder)
    (folder / "controls.yaml").rename(folder / "controls.yml")
    with pytest.raises(InputError, match="controls.yml: would not be read; call it controls.yaml"):
        read_data(folder)


def test_numbers_may_be_the_targets_own(write_dataset):
    folder, said = write_dataset([[1, 2], [3, 4]]), "names: [turn, light]\nunits: ['', '']\nabsolute: "
    for text in ("[1, 0]", "[true]", "yes"):
        (folder / "controls.yaml").write_text(said + text)
        with pytest.raises(InputError, match='controls.yaml: "absolute" must be a list of length 2'):
            read_data(folder)
    (folder / "controls.yaml").write_text(said + "[false, true]")
    with pytest.raises(InputError, match='controls.yaml: "absolute" is said of pairs'):
        read_data(folder)
    rows = [json.loads(line) for line in (folder / "prompt.json").read_text().splitlines()]
    lines = [json.dumps(row | {"reference": rows[0]["target"]}) + "\n" for row in rows]
    (folder / "prompt.json").write_text("".join(lines))
    assert read_data(folder).absolute == [False, True]


@pytest.mark.parametrize("subjects", [9, 10, 26])
def test_of_pairs_whole_subjects_are_held_out(write_dataset, subjects, capsys):
    """Of each there are five pictures, of which the first is the reference of two, and these of one each."""
    folder = write_dataset([0])
    rows = [(f"{i}_{j}.png", f"{i}_{max(0, j - 2)}.png", j) for j in (1, 2, 3, 4) for i in range(subjects)]
    lines = (json.dumps(dict(target=own, reference=other, source=n, prompt="")) for own, other, n in rows)
    (folder / "prompt.json").write_text("\n".join(lines))
    train, validation = ({row.target.name.split("_")[0] for row in own} for own in split_rows(folder))
    if subjects < 10:
        assert len(train) == subjects
    else:
        assert validation == {"5", "11"} & {str(i) for i in range(subjects)} and not train & validation
        assert f"{subjects} subjects, of which {len(validation)} are kept" in capsys.readouterr().out
        assert len(train) + len(validation) == subjects


def test_a_pair_and_its_reverse_are_held_out_together(write_dataset):
    """Of six subjects, each with a prompt of its own, every two of twelve pictures are a pair, there and back."""
    folder = write_dataset([0])
    rows = [(k, a, b) for k in range(6) for a in range(12) for b in range(12) if a != b]
    texts = (dict(target=f"{k}_{b}.png", reference=f"{k}_{a}.png", source=b - a, prompt=f"{k}") for k, a, b in rows)
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, texts)))
    train, validation = ({tuple(row.pictures) for row in own} for own in split_rows(folder))
    assert validation and not train & {pair[::-1] for pair in validation} and len(train) + len(validation) == len(rows)
    assert len(validation) < 0.25 * len(rows)


def test_no_number_is_trained_on_that_is_held_out_whatever_the_order_of_the_rows(write_dataset):
    """Of five subjects' twenty turns, there and back."""
    folder = write_dataset([0])
    rows = [(k, n, back) for k in range(5) for n in range(1, 21) for back in (False, True)]
    random.Random(0).shuffle(rows)
    texts = []
    for k, n, back in rows:
        one, other = f"{k}_0.png", f"{k}_{n}.png"
        texts.append(dict(target=[other, one][back], reference=[one, other][back], source=[n, -n][back], prompt=""))
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, texts)))
    train, validation = ({*own.controls.flatten()} for own in split_rows(folder))
    assert len(validation) == 4 and not train & validation


def test_of_a_picture_with_several_captions_none_is_trained_on_if_one_is_held_out(write_dataset):
    folder = write_dataset([0])
    texts = (dict(target=f"{i}.png", source=i, prompt=f"caption {k}") for i in range(30) for k in range(5))
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, texts)))
    train, validation = ({row.target for row in own} for own in split_rows(folder))
    assert len(validation) == 3 and len(train) == 27


@pytest.mark.parametrize("pictures, kept", [(20, 2), (3, 0)])
def test_pictures_that_show_several_numbers_are_held_out_whole_and_never_all(write_dataset, pictures, kept):
    folder = write_dataset([0])
    texts = (dict(target=f"{i % pictures}.png", source=i, prompt=f"dial {i // pictures}") for i in range(10 * pictures))
    (folder / "prompt.json").write_text("\n".join(map(json.dumps, texts)))
    train, validation = ({row.target for row in own} for own in split_rows(folder))
    assert len(validation) == kept and len(train) == pictures - kept


def test_a_source_may_be_missing_where_it_is_only_compared(write_dataset):
    """As of a meter's pictures, some of which are labelled."""
    file = write_dataset([0, 1, 2, 3]) / "prompt.json"
    texts = [json.loads(line) for line in file.read_text().splitlines()]
    del texts[0]["source"], texts[2]["source"]
    file.write_text("\n".join(map(json.dumps, texts)))
    assert controls(iterate_rows(file, known=False)) == [None, (1.0,), None, (3.0,)]
    texts[3]["source"] = [1, 2]
    file.write_text("\n".join(map(json.dumps, texts)))
    with pytest.raises(InputError, match="line 4.*2 numbers, the first row has 1"):
        [*iterate_rows(file, known=False)]


def test_copies_of_a_reference_are_one(write_dataset):
    folder = write_dataset([0])
    rows = [(f"r{i}_{j}.png", f"{i}_{j}.png", i) for i in range(12) for j in range(3)]
    for name, _, subject in rows:
        (folder / name).write_bytes(bytes([subject]))
    lines = (json.dumps(dict(target=own, reference=name, source=i, prompt="")) for i, (name, own, _) in enumerate(rows))
    (folder / "prompt.json").write_text("\n".join(lines))
    assert find_subjects(read_rows(folder / "prompt.json")).tolist() == [subject for *_, subject in rows]


def test_rows_that_validation_shares_with_training_are_told(write_dataset, capsys):
    folder = write_dataset([1, 2, 3])
    lines = (folder / "prompt.json").read_text().splitlines()
    other = json.loads(lines[1]) | {"prompt": "another", "source": 2}
    (folder / "validation.json").write_text("\n".join([lines[0], json.dumps(other)]))
    split_rows(folder)
    assert "validation.json: 1 of 2 rows are training's, too" in capsys.readouterr().out
    (folder / "validation.json").write_text(lines[0].replace('"target": "', '"target": "./'))
    split_rows(folder)
    assert "validation.json: 1 of 1 rows are training's, too" in capsys.readouterr().out
    (folder / "validation.json").write_text(lines[0].replace('"target": "', f'"target": "{folder}/'))
    split_rows(folder)
    assert "validation.json: 1 of 1 rows are training's, too" in capsys.readouterr().out


def test_a_picture_is_held_out_however_its_path_is_written(write_dataset):
    folder = write_dataset(list(range(12)))
    lines = (folder / "prompt.json").read_text().splitlines()
    lines += [line.replace('"target": "', f'"target": "{folder}/') for line in lines]
    (folder / "prompt.json").write_text("\n".join(lines))
    train, validation = ({row.target.resolve() for row in rows} for rows in split_rows(folder))
    assert validation and not train & validation


def test_a_json_list_is_told_in_one_line(write_dataset):
    file = write_dataset([1, 2]) / "prompt.json"
    file.write_text("[" + ",\n".join(file.read_text().splitlines()) + "]")
    with pytest.raises(InputError, match="prompt.json: a JSON list; expected one JSON object a line"):
        list(iterate_rows(file, problems=[]))


def test_a_subject_that_most_rows_show_is_not_held_out(write_dataset):
    folder = write_dataset([0])
    rows = [("5" if i > 9 else f"{i}", i) for i in range(40)]
    lines = (json.dumps(dict(target=f"{n}.png", reference=f"r{own}.png", source=n, prompt="")) for own, n in rows)
    (folder / "prompt.json").write_text("\n".join(lines))
    train, validation = split_rows(folder)
    assert len(validation) == 4 and train.controls.min() == 0 and train.controls.max() == 39


def test_numbers_are_not_named_as_other_columns_of_a_table_are(write_dataset):
    folder = write_dataset([1, 2, 3])
    (folder / "controls.yaml").write_text("names: [time]\nunits: [hours]\n")
    with pytest.raises(InputError, match="different names, other than file, flags, time .*, got .'time'"):
        read_data(folder)


def test_a_circle_around_zero_is_kept(write_dataset, capsys):
    folder = write_dataset([-180, -90, 0, 179])
    (folder / "controls.yaml").write_text("names: [angle]\nunits: [degrees]\nperiods: [360]\n")
    assert controls(read_data(folder).train) == [(-180,), (-90,), (0,), (179,)] and not capsys.readouterr().out


def test_what_goes_round_has_no_extremes_to_keep(write_dataset):
    pairs = [("", (float(k),)) for k in range(5)]
    chosen = {
        k for n in range(1, 12) for _, (k,) in held_out([(f"{i}", c) for i in range(n) for _, c in pairs], (5.0,))
    }
    assert chosen == set(range(5))


@pytest.mark.parametrize(
    "prompt", ["a red cup", "A red cup.", '"a red cup"', " a  red cup ", "“A Red Cup”", "'a red cup',"]
)
def test_a_prompt_as_people_paste_it_is_that_of_training(prompt, capsys):
    recognize_prompt.cache_clear()
    assert recognize_prompt(prompt, ("a cat", "a red cup")) == "a red cup"
    assert ("as in training" in capsys.readouterr().out) == (prompt != "a red cup")


def test_a_prompt_that_training_never_saw_is_told_once_with_the_nearest(capsys):
    recognize_prompt.cache_clear()
    for _ in range(2):
        assert recognize_prompt("a read cup", ("a cat", "a red cup", "a dog", "a blue car")) == "a read cup"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "not one of the 4" in printed and "a red cup" in printed
    assert recognize_prompt("anything", ()) == "anything" and not capsys.readouterr().out
