// One switch for all folded code, remembered.
addEventListener("DOMContentLoaded", () => {
  const folds = document.querySelectorAll("article details.hide");
  const bar = document.querySelector(".article-header-buttons");
  if (!folds.length || !bar) return;
  const label = document.createElement("label");
  label.className = "code-switch";
  label.innerHTML = '<input type="checkbox" role="switch"> Show all code';
  bar.prepend(label);
  const input = label.querySelector("input");
  const set = () => folds.forEach((fold) => (fold.open = input.checked));
  input.addEventListener("change", () => {
    localStorage.setItem("code", input.checked ? "open" : "folded");
    set();
  });
  input.checked = localStorage.getItem("code") === "open";
  if (input.checked) set();
});

// What a link to an equation, a figure, a statement, a term or a paper leads to, shown while
// the link is pointed at or has the focus; Escape hides it. From disk, only what is on the page.
addEventListener("DOMContentLoaded", () => {
  const kinds = "div.math, figure, div.proof, div.exercise";
  const preview = document.createElement("div");
  preview.className = "link-preview";
  preview.hidden = true;
  document.body.append(preview);
  let timer, pointed;
  const hide = () => (preview.hidden = true);
  const leave = () => {
    pointed = null;
    timer = setTimeout(hide, 200);
  };
  const pages = { [location.pathname]: document };
  const show = async ({ currentTarget: link }) => {
    pointed = link;
    if (link.dataset.meaning) return place(link, link.dataset.meaning);
    const { pathname, href, hash } = link;
    try {
      pages[pathname] ??= new DOMParser().parseFromString(
        await (await fetch(href)).text(),
        "text/html",
      );
    } catch {
      return; // from disk, or without a network
    }
    const at = pages[pathname].getElementById(decodeURIComponent(hash.slice(1)));
    const target = at?.closest(kinds) ?? at?.querySelector(`:scope > :is(${kinds})`);
    if (!target || pointed !== link) return;
    const elsewhere = pathname !== location.pathname;
    const copy = document.importNode(target, true);
    if (elsewhere && copy.querySelector(".math") && !window.MathJax) return;
    for (const part of [copy, ...copy.querySelectorAll("[id]")]) part.removeAttribute("id");
    place(link, copy);
    if (elsewhere) window.MathJax?.typesetPromise([preview]);
  };
  const place = (link, content) => {
    clearTimeout(timer);
    preview.replaceChildren(content);
    preview.hidden = false;
    const { left, bottom } = link.getBoundingClientRect();
    const room = document.documentElement.clientWidth - preview.offsetWidth - 8;
    preview.style.left = `${Math.max(8, Math.min(left, room))}px`;
    preview.style.top = `${bottom + scrollY + 4}px`;
  };
  const links = [...document.querySelectorAll('article a.reference.internal[href*="#"]')];
  for (const link of links) {
    if (link.title) link.dataset.meaning = link.title;
    link.removeAttribute("title");
    for (const event of ["mouseenter", "focus"]) link.addEventListener(event, show);
    for (const event of ["mouseleave", "blur"]) link.addEventListener(event, leave);
  }
  preview.addEventListener("mouseenter", () => clearTimeout(timer));
  preview.addEventListener("mouseleave", hide);
  addEventListener("keydown", ({ key }) => key === "Escape" && hide());
});

// A figure that is clicked fills the window; a click or Escape closes it.
addEventListener("click", ({ target }) => {
  if (!target.matches("article :is(.cell_output, figure) img")) return;
  const dialog = document.createElement("dialog");
  dialog.className = "enlarged";
  const figure = document.createElement("figure");
  figure.append(Object.assign(new Image(), { src: target.src, alt: target.alt }));
  dialog.append(figure);
  dialog.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => dialog.remove());
  target.closest(".bd-content").append(dialog);
  dialog.showModal();
});

// The search shows the section of a page in which its words stand, and leads there.
addEventListener("DOMContentLoaded", () => {
  if (typeof Search === "undefined") return;
  const excerpt = Search.makeSearchSummary;
  Search.makeSearchSummary = (html, words, anchor) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    page.querySelectorAll(".cell_input, .headerlink, .sd-badge").forEach((part) => part.remove());
    const has = (section) => {
      const text = section.textContent.toLowerCase();
      return [...words].every((word) => text.includes(word));
    };
    const sections = [...page.querySelectorAll("section[id]")].filter(has);
    const inner = sections.find((own) => !sections.some((s) => s !== own && own.contains(s)));
    if (anchor || !inner) return excerpt(html, words, anchor);
    const found = excerpt(page.documentElement.outerHTML, words, `#${CSS.escape(inner.id)}`);
    const link = document.createElement("a");
    link.textContent = inner.querySelector("h1, h2, h3, h4").textContent;
    found.prepend(link, ": ");
    setTimeout(() => {
      const to = new URL(found.closest("li").querySelector("a").href);
      to.hash = inner.id;
      link.href = to;
    });
    return found;
  };
});

// Formulas, code and tables are stops of the tab key where they are wider than their place.
const boxes = "article :is(pre, mjx-container, .output, .pst-scrollable-table-container)";
const reach = () => {
  for (const box of document.querySelectorAll(boxes)) {
    if (box.scrollWidth > box.clientWidth && box.clientWidth) box.tabIndex = 0;
    else box.removeAttribute("tabindex");
  }
};
addEventListener("load", async () => {
  await window.MathJax?.startup?.promise;
  reach();
});
addEventListener("resize", reach);

// Buttons are called what they show; a list has no children but its items.
addEventListener("load", () => {
  for (const button of document.querySelectorAll(".search-button-field")) {
    button.setAttribute("aria-label", button.textContent.replace(/\s+/g, " ").trim());
  }
  for (const summary of document.querySelectorAll("summary[aria-label]")) {
    summary.removeAttribute("aria-label");
  }
  for (const list of document.querySelectorAll(".citation-list")) {
    list.removeAttribute("role");
  }
});

// The scoreboard: claims with one verdict, and tables sorted by a click on their head.
addEventListener("load", () => {
  const filter = document.querySelector("p.filter");
  if (!filter) return;
  filter.hidden = false;
  filter.querySelector("select").addEventListener("change", ({ target }) => {
    for (const verdict of document.querySelectorAll("p.verdict b")) {
      const other = target.value && verdict.textContent !== target.value;
      verdict.closest("section").hidden = other;
    }
  });
  for (const head of document.querySelectorAll("table.statements th")) {
    if (!head.textContent) continue;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const body = head.closest("table").tBodies[0];
      const text = (row) => row.cells[head.cellIndex].textContent;
      const rows = [...body.rows];
      rows.sort((a, b) => text(a).localeCompare(text(b), "en", { numeric: true }));
      if (rows.every((row, n) => row === body.rows[n])) rows.reverse();
      body.append(...rows);
    });
  }
});
