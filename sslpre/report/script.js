// The map: wheel, pinch, drag and keys move it; the image under the pointer is shown, and all of them when few are seen.
(() => {
  "use strict";
  const box = document.getElementById("map");
  if (!box) return;
  const { names, xy, groups, across } = JSON.parse(document.getElementById("points").textContent);
  const svg = box.querySelector("svg");
  const layer = box.querySelector(".layer");
  const tip = box.querySelector(".tip");
  const dots = [...svg.querySelectorAll("path")];
  const said = document.getElementById("said");
  const FULL = 100, LEAST = 0.5, FEW = 60, NEAR = 16, SIZE = 52;
  let view = { x: 0, y: 0, side: FULL };
  let chosen = -1, pinned = false, only = "";

  const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
  const scale = () => box.clientWidth / view.side;
  const onScreen = ([x, y]) => [(x - view.x) * scale(), (y - view.y) * scale()];
  const inside = (event) => {
    const edges = box.getBoundingClientRect();
    return [event.clientX - edges.left - box.clientLeft, event.clientY - edges.top - box.clientTop];
  };
  const seen = (at) => !only || dots[at].classList.contains(only);

  function place(thumb, at) {
    thumb.style.setProperty("--x", at % across);
    thumb.style.setProperty("--y", Math.floor(at / across));
  }

  function draw() {
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.side} ${view.side}`);
    svg.style.touchAction = view.side < FULL ? "none" : "pan-y";
    const edge = SIZE / scale();
    const here = [];
    if (view.side < FULL)
      for (let at = 0; at < xy.length && here.length <= FEW; at++) {
        const [x, y] = xy[at];
        if (seen(at) && x > view.x - edge && x < view.x + view.side + edge && y > view.y - edge && y < view.y + view.side + edge)
          here.push(at);
      }
    layer.replaceChildren();
    if (here.length <= FEW)
      for (const at of here) {
        const thumb = document.createElement("span");
        const [x, y] = onScreen(xy[at]);
        thumb.className = "t";
        thumb.style.left = `${x}px`;
        thumb.style.top = `${y}px`;
        thumb.style.outlineColor = getComputedStyle(dots[at]).stroke;
        place(thumb, at);
        layer.append(thumb);
      }
    if (chosen >= 0) show(chosen);
  }

  function zoom(factor, [x, y] = [box.clientWidth / 2, box.clientHeight / 2]) {
    const side = clamp(view.side * factor, LEAST, FULL);
    const gone = (view.side - side) / box.clientWidth;
    move(view.x + x * gone, view.y + y * gone, side);
  }

  function move(x, y, side = view.side) {
    view = { x: clamp(x, 0, FULL - side), y: clamp(y, 0, FULL - side), side };
    draw();
  }

  function show(at) {
    chosen = at;
    const [x, y] = onScreen(xy[at]);
    if (x < 0 || y < 0 || x > box.clientWidth || y > box.clientHeight) return hide();
    place(tip.querySelector(".t"), at);
    const words = groups.map(([, , of, titles]) => titles[Math.min(of[at], titles.length - 1)]);
    const told = [names[at], ...words].map((line, first) => {
      const part = document.createElement(first ? "small" : "b");
      part.textContent = line;
      return part;
    });
    tip.querySelector(".words").replaceChildren(...told);
    tip.hidden = false;
    const left = x + 14 + tip.offsetWidth < box.clientWidth ? x + 14 : x - 14 - tip.offsetWidth;
    tip.style.left = `${clamp(left, 0, Math.max(0, box.clientWidth - tip.offsetWidth))}px`;
    tip.style.top = `${clamp(y - tip.offsetHeight / 2, 0, Math.max(0, box.clientHeight - tip.offsetHeight))}px`;
    dots.forEach((dot, i) => dot.classList.toggle("on", i === at));
  }

  function hide() {
    if (chosen >= 0) dots[chosen].classList.remove("on");
    chosen = -1;
    pinned = false;
    tip.hidden = true;
  }

  function nearest([x, y], reach) {
    let best = -1, least = reach * reach;
    for (let at = 0; at < xy.length; at++) {
      if (!seen(at)) continue;
      const [dx, dy] = onScreen(xy[at]);
      const far = (dx - x) ** 2 + (dy - y) ** 2;
      if (far < least) [best, least] = [at, far];
    }
    return best;
  }

  const reach = (event) => (layer.childElementCount ? SIZE / 2 : event.pointerType === "touch" ? 2 * NEAR : NEAR);

  svg.addEventListener("wheel", (event) => {
    if (event.deltaY > 0 && view.side >= FULL) return; // all is seen: the page scrolls on
    event.preventDefault();
    zoom(Math.exp(event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), inside(event));
  }, { passive: false });

  const fingers = new Map();
  let travelled = 0;
  svg.addEventListener("pointerdown", (event) => {
    if (!fingers.size) travelled = 0;
    fingers.set(event.pointerId, inside(event));
    svg.setPointerCapture(event.pointerId);
  });
  svg.addEventListener("pointermove", (event) => {
    const now = inside(event), before = fingers.get(event.pointerId);
    if (!before) {
      const at = pinned || event.pointerType === "touch" ? chosen : nearest(now, reach(event));
      if (at !== chosen) at < 0 ? hide() : show(at);
      return;
    }
    travelled += Math.hypot(now[0] - before[0], now[1] - before[1]);
    fingers.set(event.pointerId, now);
    if (fingers.size === 1) {
      move(view.x - (now[0] - before[0]) / scale(), view.y - (now[1] - before[1]) / scale());
    } else {
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const apart = (point) => Math.max(Math.hypot(point[0] - other[0], point[1] - other[1]), 1);
      zoom(apart(before) / apart(now), [(now[0] + other[0]) / 2, (now[1] + other[1]) / 2]);
    }
  });
  const lift = (event) => {
    const alone = fingers.size === 1 && fingers.delete(event.pointerId);
    fingers.delete(event.pointerId);
    if (event.type !== "pointerup" || !alone || travelled > 6) return;
    const at = nearest(inside(event), reach(event));
    if (at < 0) return hide();
    show(at);
    pinned = true;
  };
  svg.addEventListener("pointerup", lift);
  svg.addEventListener("pointercancel", lift);
  svg.addEventListener("pointerleave", () => pinned || fingers.size || hide());
  svg.addEventListener("dblclick", (event) => zoom(0.5, inside(event)));

  const WAYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  function step([dx, dy]) {
    const from = chosen < 0 ? [view.x + view.side / 2, view.y + view.side / 2] : xy[chosen];
    let best = -1, least = Infinity;
    for (let at = 0; at < xy.length; at++) {
      if (at === chosen || !seen(at)) continue;
      const x = xy[at][0] - from[0], y = xy[at][1] - from[1];
      const along = x * dx + y * dy, aside = Math.abs(x * dy) + Math.abs(y * dx);
      const far = along + 2 * aside;
      if ((along > 0 && aside <= 2 * along && far < least) || (chosen < 0 && Math.hypot(x, y) < least))
        [best, least] = [at, chosen < 0 ? Math.hypot(x, y) : far];
    }
    if (best < 0) return;
    const [x, y] = onScreen(xy[best]);
    if (x < 0 || y < 0 || x > box.clientWidth || y > box.clientHeight)
      move(xy[best][0] - view.side / 2, xy[best][1] - view.side / 2);
    show(best);
    pinned = true;
    said.textContent = tip.querySelector(".words").innerText;
  }
  svg.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (WAYS[event.key]) step(WAYS[event.key]);
    else if (event.key === "+" || event.key === "=") zoom(0.7, chosen < 0 ? undefined : onScreen(xy[chosen]));
    else if (event.key === "-") zoom(1 / 0.7, chosen < 0 ? undefined : onScreen(xy[chosen]));
    else if (event.key === "0") move(0, 0, FULL);
    else if (event.key === "Escape") hide();
    else return;
    event.preventDefault();
  });

  const DOES = { in: () => zoom(0.6), out: () => zoom(1 / 0.6), all: () => move(0, 0, FULL) };
  const tools = box.querySelector(".tools");
  tools.hidden = false;
  tools.addEventListener("click", (event) => DOES[event.target.dataset.do]?.());

  function keep(wanted) {
    only = wanted;
    dots.forEach((dot, at) => dot.classList.toggle("faint", !seen(at)));
    for (const button of document.querySelectorAll(".legend button"))
      button.setAttribute("aria-pressed", button.dataset.only === only);
    hide();
    draw();
  }
  for (const button of document.querySelectorAll(".legend button"))
    button.addEventListener("click", () => keep(button.dataset.only === only ? "" : button.dataset.only));
  for (const input of document.querySelectorAll(".by input")) input.addEventListener("change", () => keep(""));
  new ResizeObserver(draw).observe(box);
})();
