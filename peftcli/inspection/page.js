
"use strict";
// Pages of ten rows, of pictures thirty, and a filter. Without this script all rows are there.
(() => {
  const size = document.querySelector(".grid") ? 30 : 10;
  const rows = [...document.querySelectorAll("article.row")];
  const words = rows.map((row) => row.textContent.toLowerCase());
  const [controls, filter, back, on, where] = ["controls", "filter", "back", "on", "where"].map((id) =>
    document.getElementById(id));
  let chosen = rows, first = 0;

  function show() {
    const shown = new Set(chosen.slice(first, first + size));
    for (const row of rows) row.hidden = !shown.has(row);
    const last = Math.min(first + size, chosen.length);
    where.textContent = chosen.length ? `${first + 1} to ${last} of ${chosen.length}` : "no such row";
    back.disabled = first === 0;
    on.disabled = last === chosen.length;
  }

  function search() {
    const wanted = filter.value.toLowerCase();
    chosen = rows.filter((row, at) => words[at].includes(wanted));
    first = 0;
    show();
  }

  function jump() {
    const at = rows.findIndex((row) => "#" + row.id === location.hash);
    if (at < 0) return;
    filter.value = "";
    chosen = rows;
    first = at - at % size;
    show();
    rows[at].scrollIntoView();
  }

  filter.addEventListener("input", search);
  back.addEventListener("click", () => { first -= size; show(); });
  on.addEventListener("click", () => { first += size; show(); });
  addEventListener("hashchange", jump);
  controls.hidden = rows.length <= size;
  show();
  jump();
})();
