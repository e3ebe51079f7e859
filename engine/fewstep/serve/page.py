"""The page at GET /: type a class, see pictures. One file, no network beyond this server, usable at phone width."""

from __future__ import annotations

import html
import json

from fewstep.runtime.student import Student

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fewstep: __NAME__</title>
<style>
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 22%, transparent); --accent: #2f6feb; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 56rem; padding: 1.5rem 1rem 3rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.4rem; }
p { margin: .25rem 0 1.25rem; opacity: .75; }
form { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(7rem, 1fr)); align-items: end; }
label { display: grid; gap: .25rem; font-size: .85rem; }
label.wide { grid-column: 1 / -1; }
input, select, button { width: 100%; min-height: 2.75rem; padding: .4rem .7rem; font: inherit; color: inherit;
  border: 1px solid var(--line); border-radius: .5rem; background: transparent; }
select option { color: #000; background: #fff; }
button { background: var(--accent); border-color: var(--accent); color: #fff; font-weight: 600; cursor: pointer; }
button:disabled { opacity: .6; cursor: wait; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
#say { min-height: 1.5rem; margin: 1rem 0 .5rem; opacity: 1; }
#say.bad { color: #d1242f; }
#pictures { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)); }
[hidden] { display: none !important; }
figure { margin: 0; }
img { display: block; width: 100%; image-rendering: pixelated; border: 1px solid var(--line); border-radius: .35rem; }
figcaption { font-size: .75rem; text-align: center; opacity: .7; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>__TITLE__</h1>
<p>Drawn by “__NAME__”, a __KIND__ of fewstep. The same seed always gives the same picture.</p>
<form id="form">
<label class="wide" __PROMPT__>Prompt
<input id="prompt" value="a handwritten 7" maxlength="200" autocomplete="off"></label>
<label>Network steps<select id="steps"></select></label>
<label>Pictures<input id="n" type="number" min="1" max="64" value="12" required></label>
<label>First seed<input id="seed" type="number" min="0" max="4294967295" value="0" required></label>
<button id="go">Draw</button>
</form>
<p id="say" role="status"></p>
<div id="pictures"></div>
<script>
const model = __MODEL__;
const at = id => document.getElementById(id);
for (const steps of model.steps) at("steps").add(new Option(steps));
at("steps").value = model.steps.at(-1);
async function draw(event) {
  event?.preventDefault();
  const wish = { n: +at("n").value, seed: +at("seed").value, steps: +at("steps").value, size: model.size };
  if (model.classes) wish.prompt = at("prompt").value;
  at("go").disabled = true;
  try {
    const headers = { "content-type": "application/json" };
    const answer = await fetch("v1/images/generations", { method: "POST", headers, body: JSON.stringify(wish) });
    const body = await answer.json();
    if (!answer.ok) throw new Error(body.error.message);
    at("pictures").replaceChildren(...body.data.map(item => {
      const figure = document.createElement("figure");
      const image = new Image();
      const caption = document.createElement("figcaption");
      image.src = "data:image/png;base64," + item.b64_json;
      image.alt = (wish.prompt ?? "picture") + ", seed " + item.seed;
      caption.textContent = "seed " + item.seed;
      figure.append(image, caption);
      return figure;
    }));
    at("say").className = "";
    const ms = (1000 * body.seconds).toFixed(1);
    at("say").textContent = `${body.data.length} pictures in ${ms} ms, ${body.steps} steps each`;
  } catch (error) {
    at("say").className = "bad";
    at("say").textContent = error.message;
  }
  at("go").disabled = false;
}
at("form").addEventListener("submit", draw);
draw();
</script>
</body>
</html>
"""


def page(student: Student, name: str) -> str:
    """The page for one artefact, served under the model name `name`."""
    _, height, width = student.image_shape
    scale = max(1, 128 // max(height, width))
    model = {
        "steps": list(student.steps_offered) or [16],
        "classes": student.classes,
        "size": f"{width * scale}x{height * scale}",
    }
    parts = {
        "__TITLE__": "Ask for a picture",
        "__NAME__": html.escape(name),
        "__KIND__": student.kind,
        "__PROMPT__": "" if student.classes else "hidden",
        "__MODEL__": json.dumps(model),
    }
    text = _PAGE
    for mark, value in parts.items():
        text = text.replace(mark, value)
    return text
