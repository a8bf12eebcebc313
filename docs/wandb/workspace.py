"""Make the dashboard of dashboard.yaml in a project at Weights & Biases; edit the file, or the result in the browser.

pip install wandb-workspaces && wandb login
python docs/wandb/workspace.py --entity <you or your team> [--project fsvfm]

Without a network, ``--dry-run`` prints what would be made.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import yaml

#: Panels in a row, and their size in the grid of 24 columns that Weights & Biases uses.
COLUMNS, WIDTH, HEIGHT = 3, 8, 7


def workspace(description: dict[str, Any], entity: str, project: str) -> Any:
    """A :class:`wandb_workspaces.workspaces.Workspace` as described."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces

    def panel(number: int, values: dict[str, Any]) -> Any:
        row, column = divmod(number, COLUMNS)
        layout = reports.Layout(x=column * WIDTH, y=row * HEIGHT, w=WIDTH, h=HEIGHT)
        options: dict[str, Any] = {"title": values["title"], "layout": layout}
        if "media" in values:
            return reports.MediaBrowser(media_keys=values["media"], **options)
        if "line_regex" in values:
            return reports.LinePlot(x="trainer/global_step", metric_regex=values["line_regex"], **options)
        return reports.LinePlot(x="trainer/global_step", y=values["line"], **options)

    sections = [
        workspaces.Section(
            name=section["name"],
            panels=[panel(number, values) for number, values in enumerate(section["panels"])],
            is_open=True,
        )
        for section in description["sections"]
    ]
    group = workspaces.RunsetSettings(groupby=[workspaces.Metric("Group")])
    return workspaces.Workspace(
        name=description["name"], entity=entity, project=project, sections=sections, runset_settings=group
    )


def main() -> None:
    """Save the workspace as a new view of the project, or print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", default="fsvfm")
    parser.add_argument("--dry-run", action="store_true", help="print the workspace and send nothing")
    asked = parser.parse_args()
    made = workspace(
        yaml.safe_load(Path(__file__).with_name("dashboard.yaml").read_text()), asked.entity, asked.project
    )
    if asked.dry_run:
        print(made)
        return
    made.save()
    print(made.url)


if __name__ == "__main__":
    main()
