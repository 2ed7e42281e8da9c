"use strict";
// Sorting, searching and the theme. Without it the page shows the same, only in one order.
const root = document.documentElement;
const theme = document.getElementById("theme");
theme.hidden = false;
theme.addEventListener("click", () => {
  const dark = getComputedStyle(root).colorScheme === "dark"
    || (root.dataset.theme === undefined && matchMedia("(prefers-color-scheme: dark)").matches);
  root.dataset.theme = dark ? "light" : "dark";
});

const shown = new Intl.NumberFormat("en");
function sorter(table, header, index) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...header.childNodes);
  header.append(button);
  header.setAttribute("aria-sort", "none");
  button.addEventListener("click", () => {
    const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of header.parentNode.children) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row) => {
      const text = row.cells[index].textContent.trim();
      return { row, text, number: text === "" ? NaN : Number(text) };
    });
    keyed.sort((a, b) => {
      if (a.text === "" || b.text === "") return (a.text === "") - (b.text === "");
      const both = !Number.isNaN(a.number) && !Number.isNaN(b.number);
      return sign * (both ? a.number - b.number : a.text.localeCompare(b.text));
    });
    body.append(...keyed.map((k) => k.row));
  });
}

for (const table of document.querySelectorAll("table.questions")) {
  [...table.tHead.rows[0].cells].forEach((header, index) => sorter(table, header, index));
  const part = (kind) => document.querySelector(`${kind}[data-for="${table.id}"]`);
  const search = part("input"), set = part("select"), count = part("output");
  const rows = [...table.tBodies[0].rows].map((row) => ({
    row, text: row.textContent.toLowerCase(), set: row.cells[1].textContent,
  }));
  const filter = () => {
    const wanted = search.value.toLowerCase();
    let found = 0;
    for (const r of rows) {
      const fits = r.text.includes(wanted) && (set.value === "" || r.set === set.value);
      r.row.hidden = !fits;
      found += fits;
    }
    count.textContent = `${shown.format(found)} of ${shown.format(rows.length)}`;
  };
  search.addEventListener("input", filter);
  set.addEventListener("change", filter);
  search.closest(".tools").hidden = false;
  filter();
}
