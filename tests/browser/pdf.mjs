// Prints the whole book as one PDF: the articles of all pages, in the order of the
// table of contents, with the links between them kept.
// node pdf.mjs HTML_FOLDER FILE; the variable CHROMIUM says where the browser is.
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const [html, file] = process.argv.slice(2).map((path) => resolve(path));
const executablePath = process.env.CHROMIUM;
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const page = await browser.newPage();
const first = join(html, "book", "notation.html"); // has formulas, and so MathJax
await page.goto(pathToFileURL(first).href);
const names = await page.$$eval("nav.bd-links a.internal", (links) =>
  links.map((link) => new URL(link.href).pathname.split("/").at(-1)),
);
const order = [...new Set(["intro.html", ...names])];
const texts = order.map((name) => readFileSync(join(html, "book", name), "utf8"));

await page.evaluate(
  ({ order, texts }) => {
    // An address within the book becomes the place of its article in this document.
    const inside = (page, address) => {
      const [path, anchor] = address.split("#");
      const target = path || page;
      return order.includes(target) ? `#${target}${anchor ? `--${anchor}` : ""}` : null;
    };
    const book = document.createElement("main");
    texts.forEach((text, n) => {
      const parsed = new DOMParser().parseFromString(text, "text/html");
      const article = document.importNode(parsed.querySelector("article"), true);
      for (const element of article.querySelectorAll("[id]")) {
        element.id = `${order[n]}--${element.id}`;
      }
      for (const link of article.querySelectorAll("a[href]")) {
        const target = inside(order[n], link.getAttribute("href"));
        if (target) link.setAttribute("href", target);
        else if (!/^(https?|mailto):/.test(link.getAttribute("href"))) link.removeAttribute("href");
      }
      for (const fold of article.querySelectorAll("details")) fold.open = true;
      for (const image of article.querySelectorAll("img")) image.loading = "eager";
      const idle = ".headerlink, .toctree-wrapper, script";
      for (const element of article.querySelectorAll(idle)) element.remove();
      for (const folded of article.querySelectorAll(".dropdown, .toggle")) {
        folded.classList.remove("dropdown", "toggle", "toggle-hidden");
      }
      article.id = order[n];
      book.append(article);
    });
    document.body.replaceChildren(book);
    document.documentElement.dataset.theme = "light";
  },
  { order, texts },
);
await page.addStyleTag({
  content: `
    html { font-size: 10.5pt; }
    body { display: block; }
    article { max-width: none; padding: 0; overflow: visible; }
    article + article { break-before: page; }
    figure, .cell_output, .admonition, div.math { break-inside: avoid; }
    h1 { font-size: 19pt; }
    h1, h2, h3 { break-after: avoid; }
    pre { white-space: pre-wrap; }
    .cell_output { overflow: visible; }
    table { font-size: 8.5pt; }`,
});
await page.evaluate(async () => {
  await window.MathJax.startup.promise;
  await window.MathJax.typesetPromise([document.querySelector("main")]);
  await Promise.all([...document.images].map((image) => image.decode().catch(() => {})));
});
const left = await page.$$eval(".math", (all) =>
  all.filter((math) => !math.querySelector("mjx-container")).map((m) => m.textContent),
);
const number = `<div style="width: 100%; text-align: center; font-size: 8pt">
  <span class="pageNumber"></span></div>`;
await page.pdf({
  path: file,
  format: "A4",
  margin: { top: "18mm", bottom: "18mm", left: "20mm", right: "20mm" },
  displayHeaderFooter: true,
  headerTemplate: "<span></span>",
  footerTemplate: number,
  outline: true,
  tagged: true,
  timeout: 0,
});
await browser.close();
if (left.length) {
  console.log(`${left.length} equations are not typeset, the first: ${left[0]}`);
  process.exit(1);
}
