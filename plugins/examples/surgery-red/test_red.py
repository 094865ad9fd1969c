import surgery
from surgery.testing import check_method


def test_red_keeps_the_contract() -> None:
    check_method(surgery.method("red"))
