"""The table of a comparison has the report's numbers, and Markdown shows them."""

import re

from comparison_reports import RECIPES, SEEDS, report, sparse

from coda_jax.profiling.comparison_table import MISSING, Cell, tables
from coda_jax.profiling.comparison_text import markdown


def column(table, heading):
    """{row: cell} of a column."""
    place = table.headings.index(heading)
    return {name: cells[place] for name, cells in table.rows}


def test_cells_have_the_numbers_of_the_report():
    found = report()
    first, second = tables(found)
    assert [name for name, _ in first.rows] == [*RECIPES, "linear SVM", "dense model"]
    for name, recipe in found["recipes"].items():
        speed = recipe["speed"]["4x1024"]
        expected = {
            "accuracy, %": recipe["mean"],
            "trained parameters": recipe["trained"],
            "stored for each task": recipe["stored"],
            "encoder, ms": speed["encoder_ms"],
            "encoder over dense model": speed["encoder_speed_up"]["dense model"][0],
            "encoder over parallel adapter": speed["encoder_speed_up"]["parallel adapter"][0],
            "FLOPs ratio": speed["flops_ratio"],
            "end to end, ms": speed["end_to_end_ms"],
            "end to end over dense model": speed["end_to_end_speed_up"]["dense model"][0],
            "end to end over parallel adapter": speed["end_to_end_speed_up"]["parallel adapter"][0],
            "training step, ms": speed["train_step_ms"],
            "training step, MB": speed["train_step_bytes"],
            "v5e encoder, cycles": recipe["tpu"]["v5e"]["encoder_cycles"],
            "v5e encoder over dense model": recipe["tpu"]["v5e"]["encoder_speed_up"],
        }
        assert {h: column(first, h)[name].value for h in first.headings} == expected
        assert column(second, "encoder, ms")[name].value == recipe["speed"]["8x512"]["encoder_ms"]
    assert "training step, ms" not in second.headings  # nobody has one there
    assert column(first, "accuracy, %")["linear SVM"].value == 66.2
    assert column(first, "encoder, ms")["dense model"].text == "205.6"
    assert column(first, "encoder, ms")["linear SVM"].text == MISSING


def test_numbers_are_written_for_people():
    first, _ = tables(report())
    assert column(first, "accuracy, %")["CoDA, r = 3"].text == "70.2 ± 0.4"
    assert column(first, "trained parameters")["CoDA, r = 3"].text == "84,000 (3.2%)"
    assert column(first, "training step, MB")["full fine-tuning"].text == "800"
    assert column(first, "encoder over dense model")["CoDA, r = 5"].text == "4.90x"


def test_what_is_missing_or_no_number_is_a_dash():
    (table,) = tables(sparse())
    assert table.headings == ("quality, %",)
    assert column(table, "quality, %")["one"].text == "50.0"  # without an error of one seed
    assert column(table, "quality, %")["two"] == Cell(None, MISSING)
    found = report()
    found["recipes"]["LoRA"]["speed"]["4x1024"]["encoder_ms"] = float("inf")
    found["recipes"]["LoRA"]["speed"]["4x1024"]["encoder_speed_up"] = None
    found["recipes"]["LoRA"]["error"] = None
    del found["recipes"]["LoRA"]["tpu"]
    first, _ = tables(found)
    for heading in ("encoder, ms", "encoder over dense model", "v5e encoder, cycles"):
        assert column(first, heading)["LoRA"].text == MISSING
    assert column(first, "accuracy, %")["LoRA"].text == "70.4"
    assert tables({})[0].rows == ()


def test_detection_has_a_table_for_each_set_and_metric_beside_the_accuracy():
    found, names = report(), ["LoRA", "CoDA, r = 3"]
    for i, name in enumerate(names):
        metrics = {
            x: {"mean": i + 0.25, "error": 0.5} for x in ("auroc", "fpr_at_95_tpr", "aupr_in")
        }
        of_set = {"energy": metrics, **({"router_entropy": metrics} if i else {})}
        accuracy = {"mean": 0.5 + 0.25 * i, "error": None}
        sets = {"near": of_set, "far": {"energy": metrics}}
        found["recipes"][name]["detection"] = {"accuracy": accuracy, "sets": sets}
    auroc, fpr, *others = tables(found)[2:]
    assert auroc.title == "Out of distribution: near, AUROC (higher is better)"
    assert fpr.title == "Out of distribution: near, FPR at 95 % TPR (lower is better)"
    assert [table.title.split(",")[0] for table in others] == ["Out of distribution: far"] * 2
    for table in (auroc, fpr):
        assert table.headings == ("accuracy, %", "energy", "router_entropy")
        assert [name for name, _ in table.rows] == names
        assert [cell.text for cell in column(table, "accuracy, %").values()] == ["50.0", "75.0"]
        assert column(table, "energy")["LoRA"].text == "0.250 ± 0.500"
        assert column(table, "router_entropy")["LoRA"].text == MISSING
    assert tables(report())[-1].title.startswith("Speed")


def test_markdown_is_the_same_table():
    found = report()
    text = markdown(found)
    assert text.startswith("Accuracy (higher is better) on stdlib_module, 2,300 steps")
    assert f"Means over seeds {', '.join(map(str, SEEDS))}; ± is the standard error." in text
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    for block, table in zip(blocks, tables(found), strict=True):
        heading, line, *rows = [row.strip("|").split("|") for row in block.splitlines()]
        assert {len(row) for row in (heading, line, *rows)} == {1 + len(table.headings)}
        expected = [[name, *(cell.text for cell in cells)] for name, cells in table.rows]
        assert [[cell.strip() for cell in row] for row in rows] == expected


def test_a_name_cannot_leave_its_cell_in_markdown():
    text = markdown({"recipes": {"a | b\n| c": {"mean": 1.0}}})
    assert "| a \\| b \\| c | 1.0 |\n" in text
