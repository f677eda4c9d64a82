import re

from vild.report.page import Table


def test_a_bar_or_a_line_break_in_a_name_stays_in_its_cell():
    lines = Table(["class | name", "AP"], [["cup|mug\nlarge", "1.0"], ["sun", "2.0"]]).markdown.splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert [len(row) for row in rows] == [2] * 4
    assert rows[0][0] == r"class \| name" and rows[2] == [r"cup\|mug large", "1.0"]
