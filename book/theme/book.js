"use strict";
const root = document.documentElement, up = root.dataset.up, $ = (id) => document.getElementById(id);

// light and dark
$("theme").addEventListener("click", () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* storage is off: the choice lasts for this page */ }
});

// the list of pages on a narrow screen
function menu(open) {
  document.body.classList.toggle("menu", open);
  $("menu").setAttribute("aria-expanded", open);
}
$("menu").addEventListener("click", () => menu(!document.body.classList.contains("menu")));
// by hand: what scrollIntoView brings into sight is where Chromium's next Tab begins
const current = document.querySelector("#pages [aria-current]"), bottom = (element) => element.getBoundingClientRect().bottom;
if (current) $("pages").scrollTop += Math.max(0, bottom(current) - Math.min(innerHeight, bottom($("pages"))));

// copy buttons
for (const block of document.querySelectorAll(".listing")) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "copy", textContent: "Copy" });
  button.addEventListener("click", async () => {
    const text = block.querySelector("code").textContent;
    try { await navigator.clipboard.writeText(text); } catch {
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area); area.select(); document.execCommand("copy"); area.remove(); button.focus();
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  block.append(button);
}

// tables of a few rows and more sort by any column; every second click turns the order round, the third restores it
const UNIT = { ms: .001, s: 1, min: 60, h: 3600 };
function value(cell) {
  const text = (cell?.textContent || "").trim(), found = text.replace(/,(?=\d{3})/g, "").replace("−", "-").match(/^([<>≤≥]\s*)?([+-]?\d*\.?\d+(?:e[+-]?\d+)?)(?:\s*(ms|s|min|h))?(?![\w-])/i);
  return found ? [0, Number(found[2]) * (UNIT[found[3]] || 1), text] : [text ? 1 : 2, 0, text.toLowerCase()];
}
function sort(table, column, direction) {
  const body = table.tBodies[0];
  body.original ||= [...body.rows];
  const keyed = body.original.map((row) => [value(row.cells[column]), row]);
  if (direction) keyed.sort(([a], [b]) => a[0] - b[0] || direction * (a[1] - b[1] || a[2].localeCompare(b[2])));
  body.append(...keyed.map(([, row]) => row));
}
for (const table of document.querySelectorAll("main table")) {
  const head = table.tHead?.rows.length === 1 && table.tHead.rows[0], rows = [...(table.tBodies[0]?.rows || [])];
  if (!head || table.tBodies.length > 1 || rows.length < 3 || table.querySelector("[rowspan], tbody [colspan]")) continue;
  [...head.cells].forEach((th, column) => {
    if (!th.textContent.trim()) return;
    const button = Object.assign(document.createElement("button"), { type: "button", className: "sort", title: "Sort by this column" });
    button.append(...th.childNodes);
    th.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: null }[th.getAttribute("aria-sort")];
      for (const other of head.cells) other.removeAttribute("aria-sort");
      const order = next === undefined ? "ascending" : next;
      if (order) th.setAttribute("aria-sort", order);
      sort(table, column, { ascending: 1, descending: -1 }[order] || 0);
    });
  });
}

// a cell of a table that is very long shows its beginning
for (const cell of document.querySelectorAll("main td")) {
  if (cell.textContent.length < 400 || cell.querySelector("table, details")) continue;
  const box = document.createElement("div"), more = document.createElement("button");
  box.className = "long";
  box.append(...cell.childNodes);
  Object.assign(more, { type: "button", className: "more", textContent: "Show all" });
  more.setAttribute("aria-expanded", "false");
  more.addEventListener("click", () => {
    const open = box.classList.toggle("open");
    more.textContent = open ? "Show less" : "Show all";
    more.setAttribute("aria-expanded", open);
  });
  cell.append(box, more);
}

// the section being read, in the table of contents
const links = new Map([...document.querySelectorAll("#contents a")].map((a) => [decodeURIComponent(a.hash.slice(1)), a]));
const heads = [...links.keys()].map($).filter(Boolean);
function mark() {
  const here = heads.findLast((h) => h.getBoundingClientRect().top < 120) || heads[0];
  for (const [id, a] of links) a.classList.toggle("here", id === here?.id);
}
if (heads.length) { addEventListener("scroll", mark, { passive: true }); mark(); }

// a drill grows old while the book lies: after 90 days its date is yellow
for (const date of document.querySelectorAll(".drilled .badge.ok")) {
  if (Date.now() - Date.parse(date.textContent) <= 91 * 864e5) continue;
  date.classList.replace("ok", "amber");
  date.after(" (more than 90 days ago: drill it again)");
}

// a link to something inside a folded block opens it
function unfold() {
  for (let node = $(decodeURIComponent(location.hash.slice(1))); node; node = node.parentElement) if (node.tagName === "DETAILS") node.open = true;
}
addEventListener("hashchange", unfold); unfold();

// search: the index is a script, because a page opened from a folder may not fetch
const query = $("query"), found = $("found");
let asked = false;
function load() {
  if (asked) return;
  asked = true;
  document.head.append(Object.assign(document.createElement("script"), { src: up + "assets/search-index.js", onload: show }));
}
function score(words, [title, section, , text]) {
  let sum = 0;
  for (const word of words) {
    const one = 12 * title.toLowerCase().includes(word) + 8 * section.toLowerCase().includes(word) + Math.min(4, text.toLowerCase().split(word).length - 1);
    if (!one) return 0;
    sum += one;
  }
  return sum + (section ? 0 : 1);
}
function excerpt(text, words) {
  const at = Math.max(0, text.toLowerCase().indexOf(words[0]) - 40);
  const span = document.createElement("span");
  const pattern = new RegExp(`(${words.map((w) => w.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "gi");
  text.slice(at, at + 160).split(pattern).forEach((part, i) => span.append(i % 2 ? Object.assign(document.createElement("mark"), { textContent: part }) : part));
  return span;
}
function show() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  found.replaceChildren();
  const open = words.length > 0 && Boolean(window.bookIndex);
  found.hidden = !open;
  if (!open) return;
  const hits = window.bookIndex.map((row) => [score(words, row), row]).filter(([s]) => s).sort((a, b) => b[0] - a[0]).slice(0, 12);
  for (const [, row] of hits) {
    const a = Object.assign(document.createElement("a"), { href: up + row[2] });
    a.append(Object.assign(document.createElement("b"), { textContent: row[1] ? `${row[0]} › ${row[1]}` : row[0] }), excerpt(row[3], words));
    const line = document.createElement("li");
    line.append(a);
    found.append(line);
  }
  if (!hits.length) found.append(Object.assign(document.createElement("li"), { className: "none", textContent: "Nothing found" }));
}
query.addEventListener("focus", load);
query.addEventListener("input", () => { load(); show(); });
addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, textarea");
  if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) { event.preventDefault(); query.focus(); query.select(); }
  if (event.key === "Escape") { query.value = ""; show(); menu(false); }
  const results = [...found.querySelectorAll("a")], at = results.indexOf(document.activeElement);
  if (event.key === "Enter" && event.target === query) results[0]?.click();
  if (["ArrowDown", "ArrowUp"].includes(event.key) && results.length && (at >= 0 || event.target === query)) {
    event.preventDefault();
    (event.key === "ArrowDown" ? results[Math.min(at + 1, results.length - 1)] : results[at - 1] || query).focus();
  }
});
addEventListener("click", (event) => {
  if (!event.target.closest("search")) found.hidden = true;
  for (const list of document.querySelectorAll(".switch[open]")) if (!list.contains(event.target)) list.open = false;
});
