"""A plugin of pytest: ``pytest --surgery-method=NAME`` checks the contract of an installed method.

pytest loads this file in every run, so it imports surgery only where a method is asked for.
"""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options ``--surgery-method`` and ``--surgery-option``."""
    group = parser.getgroup("surgery", "model surgery")
    group.addoption(
        "--surgery-method",
        action="append",
        default=[],
        metavar="NAME",
        help="check the contract of this installed method; may be repeated",
    )
    group.addoption(
        "--surgery-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of these methods, such as rank=4; may be repeated",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Add one test for each method that is asked for."""
    for name in config.getoption("surgery_method"):
        item = Contract.from_parent(session, name=f"contract[{name}]")
        item.method = name
        items.append(item)


class Contract(pytest.Item):
    """The test of one method's contract."""

    method = ""

    def runtest(self) -> None:
        """Check the contract; the report of the test shows what was not tried."""
        import surgery
        from surgery.testing import check_method
        from surgery_recipes.recipe_files import override

        options: dict[str, Any] = {}
        for text in self.config.getoption("surgery_option"):
            override(options, text)
        held = check_method(surgery.method(self.method, **options))
        self.add_report_section("call", "contract", repr(held))

    def repr_failure(self, excinfo: Any, style: Any = None) -> str:
        """Return the message of a broken law, without a traceback."""
        return f"{type(excinfo.value).__name__}: {excinfo.value}"

    def reportinfo(self) -> tuple[Any, None, str]:
        """Return the place and the name of the test for pytest's reports."""
        return self.path, None, self.name
