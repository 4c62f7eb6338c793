// Show another study's figures, tables and numbers in the places of the lab's. Without this script
// the page shows the lab. A study's data (lib/site/extension.py) are HTML by place.
"use strict";

{
  const studies = globalThis.switchStudies;
  const article = document.querySelector(".bd-article");
  const places = [];
  const add = (key, shown) => shown && places.push({ key, shown, lab: shown });
  for (const figure of article.querySelectorAll("figure[id]")) {
    add(`figure:${figure.id}`, figure.querySelector("img"));
  }
  for (const cell of article.querySelectorAll('[class*="tag_cell-"]')) {
    if (cell.querySelector("figure")) continue;
    add(`cell:${cell.className.match(/tag_cell-(\w+)/)[1]}`, cell.querySelector(".cell_output"));
  }
  for (const number of article.querySelectorAll("[data-glue]")) {
    add(`glue:${number.dataset.glue}`, number);
  }

  const parsed = (html) => {
    const template = document.createElement("template");
    template.innerHTML = html;
    return template.content.firstElementChild;
  };

  const row = document.createElement("div");
  row.className = "study-switch";
  row.role = "group";
  row.ariaLabel = "Study";
  const said = document.createElement("p");
  said.role = "status";

  const show = (study) => {
    document.documentElement.dataset.study = study.name;
    for (const place of places) {
      const html = study.html[place.key];
      const next = html === undefined ? place.lab : parsed(html);
      next.classList.toggle("of-lab", study.name !== "lab" && html === undefined);
      place.shown.replaceWith(next);
      place.shown = next;
    }
    for (const button of row.children) button.ariaPressed = button.value === study.name;
    said.textContent = study.name === "lab" ? "" :
      `Figures, tables and numbers of ${study.title}; the text was written about the lab. ${study.note}`;
  };

  for (const { name, title } of studies) {
    const button = document.createElement("button");
    [button.type, button.value, button.textContent] = ["button", name, title];
    row.append(button);
  }
  row.addEventListener("click", ({ target }) => {
    const study = studies.find(({ name }) => name === target.value);
    if (!study) return;
    const top = row.getBoundingClientRect().top;
    show(study);
    scrollBy({ top: row.getBoundingClientRect().top - top, behavior: "instant" });
    try { localStorage.setItem("study", study.name); } catch { /* not every folder may store */ }
  });

  let stored = null;
  try { stored = localStorage.getItem("study"); } catch { /* likewise */ }
  const wanted = new URLSearchParams(location.search).get("study") ?? stored;
  const first = studies.find(({ name }) => name === wanted) ?? studies[0];
  article.querySelector("h1").after(row, said);
  show(first);
}
