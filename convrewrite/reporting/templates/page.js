"use strict";
(() => {
  const all = (query, root = document) => [...root.querySelectorAll(query)];
  const articles = all("article.site");
  const buttons = all("button.block");
  const blocks = all(".block");

  const open = (place, move) => {
    for (const article of articles) article.hidden = article.id !== `site-${place}`;
    for (const block of blocks) block.classList.toggle("open", block.dataset.site === place);
    for (const button of buttons) {
      const chosen = button.dataset.site === place;
      button.setAttribute("aria-pressed", String(chosen));
      button.tabIndex = chosen ? 0 : -1;
    }
    if (move) {
      const article = document.getElementById(`site-${place}`);
      article.scrollIntoView({ block: "center" });
      article.focus({ preventScroll: true });
    }
  };

  for (const block of blocks) {
    block.addEventListener("click", () => open(block.dataset.site, false));
    for (const [event, on] of [["mouseenter", true], ["mouseleave", false]]) {
      block.addEventListener(event, () => {
        for (const other of blocks) other.classList.toggle("near", on && other.dataset.site === block.dataset.site);
      });
    }
  }
  const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -Infinity, End: Infinity };
  buttons.forEach((button, index) => button.addEventListener("keydown", (event) => {
    if (!(event.key in moves)) return;
    event.preventDefault();
    const next = buttons[Math.min(buttons.length - 1, Math.max(0, index + moves[event.key]))];
    open(next.dataset.site, false);
    next.focus();
  }));
  const follow = (move) => {
    const found = /^#site-(\d+)$/.exec(location.hash);
    if (found && document.getElementById(`site-${found[1]}`)) open(found[1], move);
    return found;
  };
  addEventListener("hashchange", () => follow(true));
  for (const link of all("#table a")) {
    link.addEventListener("click", () => { if (link.hash === location.hash) follow(true); });
  }
  if (buttons.length && !follow(true)) {
    const widest = buttons.reduce((a, b) => (b.getBoundingClientRect().width > a.getBoundingClientRect().width + 0.5 ? b : a));
    open(widest.dataset.site, false);
  }

  const table = document.getElementById("table");
  if (!table) return;
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const find = document.getElementById("find");
  const kind = document.getElementById("kind");
  const action = document.getElementById("action");
  const count = document.getElementById("count");

  const filter = () => {
    const words = find.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !(words.every((word) => text.includes(word)) && (!kind.value || row.dataset.kind === kind.value)
        && (!action || !action.value || row.dataset.action === action.value));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${rows.length} ${rows.length === 1 ? "site" : "sites"}`;
  };
  for (const control of [find, kind, action]) if (control) control.addEventListener("input", filter);
  filter();

  const key = (row, column) => {
    const text = row.cells[column].dataset.value;
    return text !== "" && Number.isFinite(Number(text)) ? Number(text) : text;
  };
  const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b
    : String(a).localeCompare(String(b), "en", { numeric: true }));
  for (const button of all("thead button", table)) {
    button.addEventListener("click", () => {
      const column = Number(button.dataset.column);
      const head = button.parentElement;
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...rows].sort((a, b) => (up ? 1 : -1) * compare(key(a, column), key(b, column))));
    });
  }
})();
