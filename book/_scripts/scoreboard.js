// Sort a table by any column. Without this script it is complete, in the order of the book.
"use strict";

for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const numbers = new Intl.Collator(undefined, { numeric: true });

  const compare = (a, b) => {
    const difference = Number(a) - Number(b);
    return Number.isNaN(difference) ? numbers.compare(a, b) : difference;
  };

  const sortBy = (heading) => {
    const descending = heading.getAttribute("aria-sort") === "ascending";
    const key = (row) => row.cells[heading.dataset.column].dataset.sort;
    const rows = [...body.rows].sort((one, other) => {
      const [a, b] = [key(one), key(other)];
      // What has no number comes last, whichever way the others go.
      if (a === "" || b === "") return (a === "") - (b === "");
      return descending ? compare(b, a) : compare(a, b);
    });
    for (const sorted of table.querySelectorAll("[aria-sort]")) sorted.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    body.append(...rows);
  };

  for (const heading of table.querySelectorAll("th[data-column]")) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    if (heading.dataset.of) button.ariaLabel = `${button.textContent}, ${heading.dataset.of}`;
    button.addEventListener("click", () => sortBy(heading));
    heading.append(button);
  }
}
