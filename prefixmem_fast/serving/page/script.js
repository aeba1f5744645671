"use strict";

const SVG = "http://www.w3.org/2000/svg";
const MOST_SHOWN = 8; // names in the search box's list
const at = (id) => document.getElementById(id);

const state = { about: null, history: [], asked: 0, names: [], chosen: -1, typed: 0 };

// Elements. Names come from whoever made the catalogue, so they are set as text and never as HTML.

function made(tag, attributes = {}, ...inside) {
  const one = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
  one.append(...inside);
  return one;
}

function drawn(tag, attributes = {}, text = null) {
  const one = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
  if (text !== null) one.textContent = text;
  return one;
}

function percent(p) {
  const value = 100 * p;
  if (value >= 10) return `${value.toFixed(0)} %`;
  if (value >= 0.1) return `${value.toFixed(1)} %`;
  if (value >= 0.001) return `${value.toPrecision(1)} %`;
  const [digits, power] = p.toExponential(0).split("e");
  return `${digits}·10${[...power].map((c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]).join("")}`;
}

const written = (codes) => codes.join(" · ");

// The server

function say(text) {
  at("error").hidden = !text;
  at("error").textContent = text || "";
}

async function ask(address, body = null) {
  const options = body === null ? {} : { method: "POST", body: JSON.stringify(body) };
  let response;
  try {
    response = await fetch(address, options);
  } catch {
    throw new Error("The server does not answer. Is prefixmem serve still running?");
  }
  let said = null;
  try {
    said = await response.json();
  } catch {
    throw new Error(`The server's answer, of status ${response.status}, cannot be read.`);
  }
  if (!response.ok) {
    const error = new Error(said.error || `The server answers with status ${response.status}.`);
    error.starting = response.status === 503;
    throw error;
  }
  return said;
}

async function begin() {
  try {
    state.about = await ask("v1/about");
  } catch (error) {
    at("about").textContent = error.starting ? "The model is being loaded…" : "Not connected";
    if (!error.starting) say(error.message);
    setTimeout(begin, 1500);
    return;
  }
  say("");
  const { about } = state;
  const model = about.encoder ? `${about.model} with ${about.encoder}` : about.model;
  const levels = `${about.levels} codes each`;
  at("about").textContent = `${about.items.toLocaleString("en")} items, ${levels}\n${model}, on ${about.engine} ${about.version}`;
  at("beams").max = about.limits.max_beams;
  at("beams").value = Math.min(10, about.limits.max_beams);
  showHistory();
}

// The history

function showHistory() {
  const chips = state.history.map((item, place) => {
    const remove = made("button", { type: "button", "aria-label": `remove ${item.name}`, title: "remove" }, "×");
    remove.addEventListener("click", () => change(state.history.filter((_, other) => other !== place)));
    const name = made("span", { class: "name", title: item.name }, item.name);
    return made("li", {}, name, made("span", { class: "sid" }, written(item.sid)), remove);
  });
  at("history").replaceChildren(...(chips.length ? chips : [made("li", { class: "empty" }, "No item yet.")]));
  const most = state.about ? state.about.limits.max_history : 0;
  at("history-count").textContent = most ? `${state.history.length} of ${most} items at most, oldest first` : "";
}

function change(history) {
  state.history = history;
  showHistory();
  recommend();
}

async function showNames() {
  const turn = ++state.typed;
  const prefix = at("search").value.trim();
  if (!prefix) return hideNames();
  let found;
  try {
    found = (await ask(`v1/items?limit=${MOST_SHOWN}&prefix=${encodeURIComponent(prefix)}`)).items;
  } catch (error) {
    if (turn === state.typed) say(error.message);
    return;
  }
  if (turn !== state.typed) return; // another letter has been typed since
  state.names = found;
  state.chosen = found.length ? 0 : -1;
  const lines = found.map((item, place) => {
    const name = made("span", { class: "name" }, item.name);
    const line = made("li", { role: "option", id: `name-${place}` }, name, made("span", { class: "sid" }, written(item.sid)));
    line.addEventListener("mousedown", (event) => {
      event.preventDefault(); // the box keeps the cursor
      take(place);
    });
    return line;
  });
  const none = made("li", { class: "empty" }, `No item's name begins with “${prefix}”.`);
  at("names").replaceChildren(...(lines.length ? lines : [none]));
  at("names").hidden = false;
  at("search").setAttribute("aria-expanded", "true");
  showChosen();
}

function showChosen() {
  [...at("names").children].forEach((line, place) => line.setAttribute("aria-selected", place === state.chosen));
  at("search").setAttribute("aria-activedescendant", state.chosen < 0 ? "" : `name-${state.chosen}`);
}

function hideNames() {
  state.typed++;
  state.names = [];
  state.chosen = -1;
  at("names").hidden = true;
  at("search").setAttribute("aria-expanded", "false");
  at("search").setAttribute("aria-activedescendant", "");
}

function take(place) {
  const item = state.names[place];
  at("search").value = "";
  hideNames();
  change([...state.history, item]);
}

function typedKey(event) {
  const count = state.names.length;
  if (event.key === "Escape") hideNames();
  else if (event.key === "Enter" && state.chosen >= 0) take(state.chosen);
  else if (event.key === "Enter" && at("search").value.trim()) {
    // Not in the list: the server says what is wrong with it.
    change([...state.history, { name: at("search").value.trim(), sid: [] }]);
    at("search").value = "";
    hideNames();
  } else if (count && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    state.chosen = (state.chosen + (event.key === "ArrowDown" ? 1 : count - 1)) % count;
    showChosen();
  } else return;
  event.preventDefault();
}

// The search

async function recommend() {
  const turn = ++state.asked;
  hint(null);
  if (state.about && state.history.length < Math.max(state.about.limits.min_history, 1)) {
    say("");
    show(null, "Add an item, or take the example.");
    return;
  }
  for (const id of ["tree", "items"]) at(id).classList.add("old");
  const began = performance.now();
  const beams = at("beams").value === "" ? null : Number(at("beams").value);
  try {
    const answer = await ask("v1/recommend", { history: state.history.map((item) => item.name), num_beams: beams });
    if (turn !== state.asked) return; // the history has changed since
    say("");
    show(answer, "");
    at("seconds").textContent = `answered in ${((performance.now() - began) / 1000).toFixed(2)} s`;
  } catch (error) {
    if (turn !== state.asked) return;
    say(error.message);
    show(null, "No answer: see the message above.");
  }
}

function show(answer, instead) {
  for (const id of ["tree", "items"]) at(id).classList.remove("old");
  at("seconds").textContent = "";
  if (answer === null) {
    at("tree").replaceChildren(made("p", { class: "empty" }, instead));
    at("items").replaceChildren(made("li", { class: "empty" }, "Nothing yet."));
    return;
  }
  at("tree").replaceChildren(treeOf(answer.beams));
  const best = answer.items.length ? answer.items[0].probability : 1;
  at("items").replaceChildren(...answer.items.map((found, place) => itemOf(found, place, best)));
}

function itemOf(found, place, best) {
  const bar = made("span", { class: "bar" });
  bar.style.width = `${Math.max((100 * found.probability) / best, 0.5)}%`;
  const more = found.names.length > 2 ? ` and ${found.names.length - 2} more` : "";
  const names = found.names.slice(0, 2).join(", ") + more;
  const what = made(
    "div",
    { class: "what" },
    made("span", { class: "rank" }, `${place + 1}`),
    made("span", { class: "name", title: found.names.slice(0, 50).join("\n") }, names),
    made("span", { class: "share" }, percent(found.probability)),
    made("span", { class: "sid" }, written(found.sid)),
  );
  const line = made("li", { "data-prefix": found.sid.join(",") }, what, made("div", { class: "track" }, bar));
  line.addEventListener("mouseenter", () => light(found.sid.join(",")));
  line.addEventListener("mouseleave", () => light(null));
  return line;
}

const ROW = 30, TOP = 30, HIGH = 22, WIDE = 92, ROOT = 64;

// Prefixes as a tree: children stand beside their parent, the more probable one above.
function layout(levels) {
  const nodes = [new Map([["", { key: "", children: [], level: 0, probability: 1, end: false }]])];
  levels.forEach((beams, index) => {
    const here = new Map();
    for (const beam of beams) {
      const key = beam.prefix.join(",");
      const node = { key, prefix: beam.prefix, level: index + 1, probability: beam.probability, children: [] };
      here.set(key, node);
      nodes[index].get(beam.prefix.slice(0, -1).join(",")).children.push(node);
    }
    nodes.push(here);
  });
  let row = 0;
  const place = (node) => {
    node.end = node.level < levels.length && !node.children.length;
    node.children.forEach(place);
    const { children } = node;
    node.y = children.length ? (children[0].y + children[children.length - 1].y) / 2 : TOP + ROW * (row++ + 0.5);
    node.alive = node.level === levels.length || children.some((child) => child.alive);
  };
  place(nodes[0].get(""));
  return { columns: nodes.map((column) => [...column.values()]), rows: row };
}

function treeOf(levels) {
  const { columns, rows } = layout(levels);
  const room = at("tree").clientWidth - 2;
  const gap = Math.max((room - ROOT) / levels.length - WIDE, 30);
  const x = (level) => (level ? ROOT + gap * level + WIDE * (level - 1) : 0);
  const size = { width: Math.floor(x(levels.length) + WIDE + 2), height: TOP + ROW * rows + 6 };
  const svg = drawn("svg", { ...size, role: "img", "aria-label": `the beams of ${levels.length} levels as a tree` });
  const links = drawn("g"), boxes = drawn("g");
  svg.append(links, boxes);
  columns.forEach((column, level) => {
    const title = level ? `level ${level}` : "";
    svg.append(drawn("text", { class: "head", x: x(level) + 1, y: 14 }, title));
    const most = Math.max(...column.map((node) => node.probability));
    for (const node of column) {
      boxes.append(level ? boxOf(node, x(level), node.probability / most) : rootOf(node));
      for (const child of node.children) {
        const from = x(level) + (level ? WIDE : ROOT - 8), to = x(level + 1), bend = (to - from) / 2;
        const share = child.probability / Math.max(...columns[level + 1].map((other) => other.probability));
        const d = `M${from},${node.y} C${from + bend},${node.y} ${to - bend},${child.y} ${to},${child.y}`;
        links.append(
          drawn("path", {
            d,
            class: child.alive ? "link" : "link end",
            "data-prefix": child.key,
            "stroke-width": (1 + 9 * Math.sqrt(share)).toFixed(2),
            "stroke-opacity": (0.18 + 0.5 * share).toFixed(3),
          }),
        );
      }
    }
  });
  const wide = (link) => Number(link.getAttribute("stroke-width"));
  links.append(...[...links.children].sort((a, b) => wide(a) - wide(b))); // the most probable on top
  return svg;
}

function rootOf(node) {
  const group = drawn("g", { class: "node" });
  group.append(drawn("text", { x: 0, y: node.y + 4 }, "history"));
  return group;
}

function boxOf(node, x, share) {
  const group = drawn("g", { class: node.alive ? "node" : "node end", "data-prefix": node.key, tabindex: 0 });
  const box = { x, y: node.y - HIGH / 2, width: WIDE, height: HIGH, rx: 5 };
  group.append(
    drawn("rect", { ...box, class: "back" }),
    drawn("rect", { ...box, class: "fill", "fill-opacity": (0.06 + 0.4 * share).toFixed(3) }),
    drawn("text", { x: x + 8, y: node.y + 4, class: "code" }, node.prefix[node.level - 1]),
    drawn("text", { x: x + WIDE - 7, y: node.y + 4, class: "share", "text-anchor": "end" }, percent(node.probability)),
    drawn("title", {}, `prefix ${written(node.prefix)}, probability ${percent(node.probability)}`),
  );
  const fate = node.end ? "\nIt goes no further: others were more probable." : "";
  const text = `Prefix ${written(node.prefix)}\nProbability ${percent(node.probability)}${fate}`;
  const enter = () => (light(node.key), hint(text, group));
  const leave = () => (light(null), hint(null));
  for (const event of ["mouseenter", "focus"]) group.addEventListener(event, enter);
  for (const event of ["mouseleave", "blur"]) group.addEventListener(event, leave);
  return group;
}

// A prefix, what it begins with, and what begins with it are lit; the rest is dimmed.
function light(key) {
  const begins = (long, short) => long === short || long.startsWith(`${short},`);
  for (const one of document.querySelectorAll("#tree [data-prefix]")) {
    const other = one.getAttribute("data-prefix");
    one.classList.toggle("dim", key !== null && !begins(key, other) && !begins(other, key));
  }
  for (const line of document.querySelectorAll("#items [data-prefix]")) {
    line.classList.toggle("lit", key !== null && begins(line.getAttribute("data-prefix"), key));
  }
}

function hint(text, beside = null) {
  at("hint").hidden = text === null;
  if (text === null) return;
  at("hint").textContent = text;
  const box = beside.getBoundingClientRect();
  at("hint").style.left = `${Math.max(Math.min(box.left, innerWidth - 350), 8)}px`;
  at("hint").style.top = `${box.bottom + 8 + at("hint").offsetHeight > innerHeight ? box.top - 8 - at("hint").offsetHeight : box.bottom + 8}px`;
}

at("search").addEventListener("input", showNames);
at("search").addEventListener("keydown", typedKey);
at("search").addEventListener("blur", hideNames);
at("example").addEventListener("click", () => state.about && change(state.about.example));
at("clear").addEventListener("click", () => change([]));
at("beams").addEventListener("change", recommend);
let resized = 0;
addEventListener("resize", () => {
  clearTimeout(resized);
  resized = setTimeout(() => state.history.length && recommend(), 250);
});
showHistory();
begin();
