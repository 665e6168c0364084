"""Pages in a real Chromium: what a check of quality finds on them. It needs playwright and Debian's chromium."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))

_AUDIT = """() => {
  const found = [];
  const wide = document.documentElement.scrollWidth - window.innerWidth;
  if (wide > 0) found.push(`the page is ${wide} px too wide`);
  for (const image of document.querySelectorAll('img:not([alt])'))
    found.push(`no alt: ${image.outerHTML.slice(0, 80)}`);
  const parse = (text) => { const n = (text.match(/[\\d.]+/g) || []).map(Number);
    return text.startsWith('rgb') ? [n[0], n[1], n[2], n.length > 3 ? n[3] : 1] : null; };
  const lum = (c) => { const f = c.slice(0, 3).map((v) => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
  const over = (top, under) => [0, 1, 2].map((i) => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const behind = (node) => { const layers = [];
    for (let at = node; at; at = at.parentElement) {
      const style = getComputedStyle(at);
      if (style.backgroundImage !== 'none') return null;
      const colour = parse(style.backgroundColor);
      if (!colour) return null;
      layers.push(colour);
      if (colour[3] === 1) break;
    }
    let result = [255, 255, 255, 1];
    if (matchMedia('(prefers-color-scheme: dark)').matches && layers.at(-1)[3] < 1) return null;
    for (const layer of layers.reverse()) result = over(layer, result);
    return result; };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), node = walker.currentNode.parentElement;
    if (!text || seen.has(node) || !node.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    seen.add(node);
    if (node.closest('[disabled], script, style, noscript, svg, option')) continue;
    const style = getComputedStyle(node), colour = parse(style.color), ground = behind(node);
    if (!colour || !ground) continue;
    const box = node.getBoundingClientRect();
    if (box.width < 2 || box.height < 2) continue;
    const [a, b] = [lum(over(colour, ground)), lum(ground)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) found.push(`contrast ${ratio.toFixed(2)}: "${text.slice(0, 40)}" ${style.color}`);
  }
  return found;
}"""


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright; the test is skipped where playwright or Chromium is missing."""
    import pytest

    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium, or set CHROMIUM")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def page_of(browser: Any, width: int, scheme: str) -> Iterator[tuple[Any, list[str]]]:
    """A page of some width in pixels, light or dark, and the list that errors of its console go into."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page, errors
    context.close()


def audit(page: Any) -> list[str]:
    """What is wrong with a page: too wide, pictures without alt text, text of too little contrast (WCAG AA)."""
    return list(page.evaluate(_AUDIT))
