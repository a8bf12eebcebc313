"""The web page: drop a photograph or video, read what the number means, look at the reasons and at the masks.

Everything that the server sends is text and pictures inside the page itself, so that no file of it is ever fetched by a
name. What comes from outside, such as a file's name, is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from fsvfm.errors import FsvfmError
from fsvfm.service import Scored, Service

if TYPE_CHECKING:
    import gradio as gr

TITLE = "Is this face forged?"

#: Seeds that the button of the masks goes through.
_SEEDS = 1000

#: The page's own rules; colours that depend on light or dark come from the theme.
CSS = """
.gradio-container { max-width: 1060px !important; margin: 0 auto !important; }
.html-container:has(.fs) { padding: 0 !important; }
.fs a { margin: 0; padding: 0; }
.fs h1 { font-size: 1.6rem; margin: .2em 0; }
.fs p { margin: .35em 0; line-height: 1.5; }
.fs .warn { border-left: 5px solid #e69f00; background: rgba(230,159,0,.16); padding: .6em .9em; margin: .6em 0;
            border-radius: 6px; font-weight: 600; }
.fs .verdict { border: 1px solid var(--border-color-primary); border-left: 10px solid var(--mark); padding: .7em 1em;
               border-radius: 8px; margin: .6em 0; }
.fs .verdict b.word { font-size: 1.7rem; line-height: 1.2; display: block; }
.fs .small { font-size: .85rem; opacity: .8; }
.fs img { max-width: 100%; height: auto; border-radius: 6px; display: block; }
.fs img.main { max-height: 70vh; margin: .4em 0; }
.fs .scroll { overflow-x: auto; }
.fs .scroll img { min-width: 620px; }
.fs table { border-collapse: collapse; margin: .5em 0 1em; width: 100%; }
.fs table, .fs tbody, .fs tr { border: none !important; }
.fs th, .fs td { text-align: left; padding: .3em .7em .3em 0; border: none !important;
                 border-bottom: 1px solid var(--border-color-primary) !important; }
.fs td.number, .fs th.number { text-align: right; font-variant-numeric: tabular-nums; }
.fs .dot { display: inline-block; width: .75em; height: .75em; border-radius: 50%; background: var(--mark);
           margin-right: .45em; }
.fs .grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(46%, 165px), 1fr)); gap: .9em;
            margin: .6em 0; }
.fs figure { margin: 0; }
.fs figure img { width: 100%; margin-bottom: .4em; }
.fs figcaption { font-size: .85rem; padding-top: .25em; line-height: 1.35; }
.fs .bar { position: relative; height: 1em; min-width: 8em; background: rgba(128,128,128,.13); border-radius: 3px; }
.fs .bar i { position: absolute; top: 0; bottom: 0; border-radius: 3px; }
.fs .bar::after { content: ""; position: absolute; left: 50%; top: -2px; bottom: -2px; width: 1px; background: #888; }
"""

#: Colours of verdicts, as in annotated pictures.
_MARKS = {"real": "#009e73", "fake": "#d53c14", "uncertain": "#e69f00", "no face": "#828282", "failed": "#828282"}

_RED, _BLUE = "#b2182b", "#2166ac"


# ------------------------------------------------------------------------------------------------------------- words


def verdict_words(record: Mapping[str, Any], task: str) -> tuple[str, str]:
    """A result's verdict as a headline, and what it means.

    Args:
        record: as ``fsvfm/prediction.schema.json`` says.
        task: ``forgery`` or ``antispoof``.

    Returns:
        headline and explanation, plain text.
    """
    what = "an attack" if task == "antispoof" else "a forgery"
    if record["error"] is not None:
        return "Not scored", record["error"]
    if record["verdict"] == "no face":
        return "No face found", "There is nothing to judge. Small, covered and strongly turned faces may be missed."
    several = len(record["faces"]) > 1
    whose = "The most suspicious face has" if several else "The face has"
    told = f"{whose} a probability of {record['probability']:.3f} of being {what}"
    threshold = record["threshold"]
    limit = f"the threshold of {threshold['value']:.3f}"
    if record["verdict"] == "fake":
        return "Fake" if task != "antispoof" else "Attack", f"{told}, which reaches {limit}."
    if record["verdict"] == "real":
        return "Real", (
            f"{told}, below {limit}. That is no proof: it means that this detector found none of the traces it knows."
        )
    band = threshold["band"]
    why = f"Between {band['low']:.3f} and {band['high']:.3f}, or where that band and the threshold disagree, it does "
    return "Uncertain", f"{told}. {why}not decide, so that its error rate stays at {band['alpha']:.0%}."


def notes_html(notes: Sequence[str]) -> str:
    """What every reader must know, so that nobody misses it."""
    return "".join(f'<div class="warn">⚠ {escape(note)}.</div>' for note in notes)


def result_html(scored: Scored, facts: Mapping[str, Any]) -> str:
    """A result for the page: notes, verdict, picture, faces, timeline."""
    record = scored.record
    headline, meaning = verdict_words(record, facts["task"])
    mark = _MARKS["failed" if record["error"] is not None else record["verdict"]]
    parts = [
        f'<div class="fs" id="result"><div class="verdict" style="--mark:{mark}"><b class="word">{headline}</b>'
        f"<p>{escape(meaning)}</p>"
    ]
    if record["error"] is None and record["verdict"] != "no face":
        parts.append(f'<p class="small">{escape(facts["threshold"])}</p>')
    parts.append(f'<p class="small">{escape(_what(record))}</p></div>')
    parts.append(notes_html(record["notes"]))
    if scored.annotated:
        parts.append(_image(scored.annotated, "faces with boxes and scores", "main"))
    if record["faces"]:
        parts.append(_faces_table(record, facts))
    if scored.timeline:
        parts.append(f'<div class="scroll">{_image(scored.timeline, "scores over time", "")}</div>')
    return "".join(parts) + "</div>"


def problem_html(text: str) -> str:
    """Why there is no result."""
    return (
        f'<div class="fs" id="result"><div class="verdict" style="--mark:{_MARKS["failed"]}">'
        f'<b class="word">Not done</b><p>{escape(text[:1].upper() + text[1:])}.</p></div></div>'
    )


def _what(record: Mapping[str, Any]) -> str:
    count = len(record["faces"])
    faces = f"{count} face{'' if count == 1 else 's'}"
    if record["error"] is not None:
        return str(record["source"])
    if record["kind"] == "photo":
        return f"{record['source']}: photograph, {faces}"
    how = {"mean": "mean", "trimmed": "trimmed mean", "top_k": "mean of the five highest"}[record["aggregate"]]
    return (
        f"{record['source']}: video, {len(record['frames'])} frames scored, {faces} followed; a face's score is the "
        f"{how} of its frames. The picture shows the most suspicious frame"
    )


def _faces_table(record: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    what = "attack" if facts["task"] == "antispoof" else "fake"
    members = facts["names"] if len(facts["names"]) > 1 else []
    frames = record["kind"] != "photo"
    head = "".join(f'<th class="number">{escape(name)}</th>' for name in members)
    head = f'<th>face</th><th>verdict</th><th class="number">P({what})</th>{head}'
    rows = []
    for face in record["faces"]:
        each = "".join(f'<td class="number">{face["members"][name]:.3f}</td>' for name in members)
        seen = f'<td class="number">{face["frames"]}</td>' if frames else ""
        rows.append(
            f'<tr><td>{face["id"]}</td><td style="--mark:{_MARKS[face["verdict"]]}"><span class="dot"></span>'
            f'{face["verdict"]}</td><td class="number">{face["probability"]:.3f}</td>{each}{seen}</tr>'
        )
    head += '<th class="number">frames</th>' if frames else ""
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def explanation_html(found: Sequence[Mapping[str, Any]], task: str) -> str:
    """Maps over a face, and what each region adds."""
    what = "attack" if task == "antispoof" else "fake"
    parts = ['<div class="fs">']
    for member in found:
        title = f"{escape(member['name'])}: " if len(found) > 1 else ""
        parts.append(f"<p><b>{title}P({what}) of this crop = {member['probability']:.3f}</b></p>")
        figures = [_figure(member["face"], caption="the face as it was cut")]
        for view in member["views"]:
            low, high = view["limits"]
            unit = f"red: {what}, blue: real; ±{high:.3g}" if view["signed"] else f"dark {low:.3g}, bright {high:.3g}"
            figures.append(_figure(view["picture"], caption=f"<b>{view['title']}</b><br>{view['unit']}<br>{unit}"))
        parts.append(f'<div class="grid">{"".join(figures)}</div>')
        if member["regions"]:
            parts.append(_regions_table(member["regions"], what))
        parts += [f'<p class="small">No {escape(view)}: {escape(why)}.</p>' for view, why in member["omitted"].items()]
        parts += [f'<p class="small">{escape(note)}.</p>' for note in member["notes"]]
    parts.append(
        '<p class="small">Each view answers another question: where attention flows, what each patch adds to the score,'
        " by how much the score changes when a region is hidden, what the pre-trained network did not expect. They "
        "describe the detector and prove nothing about the picture.</p></div>"
    )
    return "".join(parts)


def _regions_table(regions: Mapping[str, tuple[float, float]], what: str) -> str:
    reach = max((abs(logit) for logit, _ in regions.values()), default=0) or 1.0
    rows = []
    for name, (logit, probability) in regions.items():
        width = 50 * abs(logit) / reach
        start, colour = (50.0, _RED) if logit > 0 else (50 - width, _BLUE)
        bar = f'<div class="bar"><i style="left:{start:.1f}%;width:{width:.1f}%;background:{colour}"></i></div>'
        rows.append(f'<tr><td>{escape(name)}</td><td>{bar}</td><td class="number">{probability:+.3f}</td></tr>')
    head = f'<th>region</th><th>speaks for real — {what}</th><th class="number">change of P({what})</th>'
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def masks_html(made: Mapping[str, Any], ratio: float) -> str:
    """A face under every masking strategy."""
    names = {
        "crfr_p": "CRFR-P, the papers': one region covered whole, the rest in proportion",
        "crfr_r": "CRFR-R: one region covered whole, the rest at random",
        "fasking_i": "Fasking-I: facial components first",
        "frp": "FRP: every region in proportion",
        "random": "at random (MAE)",
    }
    figures = [_figure(made["face"], caption="the face"), _figure(made["regions"], caption="its regions")]
    parts = [f'<div class="fs"><div class="grid">{"".join(figures)}</div><div class="grid">']
    for name, pictures in made["strategies"].items():
        shown = [picture for picture in (pictures["masked"], pictures["predicted"]) if picture is not None]
        parts.append(_figure(*shown, caption=f"<b>{name}</b><br>{escape(names.get(name, ''))}"))
    parts.append(f'</div><p class="small">{ratio:.0%} of the patches are hidden: grey; red is a region covered whole. ')
    if made["reconstructs"]:
        told = (
            "Below it stands what the pre-trained network predicts there, with the true mean and contrast of each patch"
        )
    else:
        told = "With encoder=<pre-training checkpoint> the server also shows what the network predicts there"
    return "".join(parts) + f"{told}.</p></div>"


def _figure(*pictures: bytes, caption: str) -> str:
    images = "".join(_image(picture, "", "") for picture in pictures)
    return f"<figure>{images}<figcaption>{caption}</figcaption></figure>"


def _image(picture: bytes, alt: str, kind: str) -> str:
    form = "png" if picture.startswith(b"\x89PNG") else "jpeg"
    data = base64.b64encode(picture).decode()
    return f'<img class="{kind}" alt="{escape(alt)}" src="data:image/{form};base64,{data}">'


# -------------------------------------------------------------------------------------------------------------- page


def build(service: Service) -> gr.Blocks:
    """The page as Gradio blocks.

    The browser sends texts and numbers only: of a dropped file the token that its upload was answered with, which
    nobody can guess and which names nothing on the disk.
    """
    import gradio as gr

    facts, limits = service.facts, service.limits
    what = "a presentation attack (a print, a screen, a mask)" if facts["task"] == "antispoof" else "forged"

    def said(make: Callable[[], str]) -> str:
        try:
            return make()
        except FsvfmError as error:
            return problem_html(str(error))

    def score(_: Any, ticket: str) -> tuple[Any, ...]:
        """Score a dropped file; what was shown of the one before goes away."""
        scored = Scored({})

        def shown() -> str:
            nonlocal scored
            upload = service.find(ticket)
            if upload is None:
                return problem_html("the upload is gone; drop the photograph or video again")
            scored = service.score(upload, pictures=True)
            return result_html(scored, facts)

        html = said(shown)
        known = [face for face in scored.record.get("faces", []) if face["id"] in scored.faces]
        first = max(known, key=lambda face: face["probability"], default={"id": None})["id"]
        choices = [(f"face {face['id']}: {face['verdict']} {face['probability']:.2f}", face["id"]) for face in known]
        faces = gr.Dropdown(choices, value=first, interactive=len(known) > 1)
        has = gr.Column(visible=bool(scored.faces))
        # The notes now stand beside the verdict, which is what one looks at, or at the top if there is none.
        notes = gr.HTML(visible=bool(facts["notes"]) and not scored.record)
        return None, html, scored.token, faces, faces, has, has, "", "", gr.HTML(visible=not scored.faces), notes

    def explain(token: str, face: int) -> str:
        return said(lambda: explanation_html(service.explain(token, int(face)), facts["task"]))

    def mask(token: str, face: int, ratio: float, seed: int) -> tuple[str, int]:
        share = min(max(float(ratio), 0.1), 0.9)
        return said(lambda: masks_html(service.mask(token, int(face), share, seed), share)), (seed + 1) % _SEEDS

    # Waiting is the service's business, which knows both doors.
    event: dict[str, Any] = {"concurrency_limit": None, "api_visibility": "private"}
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(
            f'<div class="fs"><h1>{TITLE}</h1><p>Drop a photograph or a video. Every face in it gets a probability of '
            f"being {what}, and a verdict at a stated threshold. Your file is deleted as soon as it is scored.</p>"
            f'<p class="small">Limits: {limits.text()}. Programs use the <a href="openapi.json">HTTP endpoint</a>.</p>'
            "</div>"
        )
        warning = gr.HTML(f'<div class="fs">{notes_html(facts["notes"])}</div>', visible=bool(facts["notes"]))
        drop = gr.File(label="Photograph or video", file_count="single", height=150, elem_id="drop")
        ticket = gr.Textbox(visible=False)
        token, seed = gr.State(""), gr.State(0)
        with gr.Tab("Verdict"):
            result = gr.HTML('<div class="fs"><p class="small">The verdict will stand here.</p></div>')
            with gr.Column(visible=False) as reasons:
                with gr.Row(equal_height=True):
                    face = gr.Dropdown(label="Face", filterable=False, scale=2)
                    ask = gr.Button("Explain this face", variant="primary", elem_id="explain")
                why = gr.HTML(elem_id="explanation")
        with gr.Tab("Masks and reconstruction"):
            nothing = gr.HTML('<div class="fs"><p>Drop a picture with a face first.</p></div>')
            with gr.Column(visible=False) as masking:
                gr.HTML(
                    '<div class="fs"><p>Pre-training hides most of a face and predicts it from the rest. Which patches '
                    "are hidden decides what is learned.</p></div>"
                )
                with gr.Row(equal_height=True):
                    masked_face = gr.Dropdown(label="Face", filterable=False)
                    ratio = gr.Slider(0.1, 0.9, 0.75, step=0.05, label="Share of patches to hide")
                    draw = gr.Button("Hide patches", variant="primary", elem_id="mask")
                masks = gr.HTML(elem_id="masks")
        drop.upload(
            score,
            [drop, ticket],
            [drop, result, token, face, masked_face, reasons, masking, why, masks, nothing, warning],
            js="(file, _) => [null, file ? file.path : null]",
            show_progress_on=[result],
            **event,
        )
        ask.click(explain, [token, face], why, **event)
        draw.click(mask, [token, masked_face, ratio, seed], [masks, seed], **event)
    page.queue(max_size=4 * (limits.queue + limits.concurrency), api_open=False)
    return page


def theme() -> gr.themes.Base:
    """Look of the page, with the fonts that the visitor has: none is fetched."""
    import gradio as gr

    return gr.themes.Base(
        primary_hue="teal", font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"), radius_size="sm"
    )
