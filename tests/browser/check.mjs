// Opens every page of the book in Chromium, from disk and without a network, and
// looks: console errors, failed or outside requests, typeset equations, figures in
// both themes, solutions that unfold, narrow screens, search, accessibility.
// node check.mjs HTML_FOLDER; prints what is wrong and exits with 1, or one line.
// The variable CHROMIUM says where the browser is.
import { readdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join, relative, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core"), "utf8");
const html = resolve(process.argv[2] ?? "");
const NARROW = 390;
const faults = [];

function pages(folder) {
  return readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
    const path = join(folder, entry.name);
    if (entry.isDirectory()) {
      return entry.name.startsWith("_") || entry.name === "mathjax" ? [] : pages(path);
    }
    return entry.name.endsWith(".html") ? [path] : [];
  });
}

async function open(context, path, fault) {
  const page = await context.newPage();
  page.on("console", (m) => m.type() === "error" && fault(`console: ${m.text()}`));
  page.on("pageerror", (error) => fault(`script: ${error.message}`));
  page.on("requestfailed", (request) => fault(`failed: ${request.url()}`));
  page.on("request", (request) => {
    if (!/^(file|data|blob):/.test(request.url())) fault(`asks for ${request.url()}`);
  });
  await page.goto(pathToFileURL(path).href);
  await page.evaluate(() => window.MathJax?.startup?.promise);
  await page.addStyleTag({ content: "* { transition: none !important; }" });
  return page;
}

async function equations(page, fault) {
  const { marked, typeset, errors } = await page.evaluate(() => ({
    marked: document.querySelectorAll("article .math").length,
    typeset: document.querySelectorAll("article .math mjx-container").length,
    errors: document.querySelectorAll("mjx-merror, [data-mjx-error]").length,
  }));
  if (typeset < marked) fault(`${marked} equations, ${typeset} typeset`);
  if (errors) fault(`${errors} equations with errors`);
}

async function figures(page, theme, fault) {
  await page.evaluate((name) => (document.documentElement.dataset.theme = name), theme);
  const empty = await page.$$eval("article img", (images) =>
    images
      .filter((image) => {
        const box = image.getBoundingClientRect();
        const hidden =
          image.hidden || image.closest("details:not([open]), .toggle-hidden");
        return !hidden && (box.width < 20 || box.height < 20 || !image.naturalWidth);
      })
      .map((image) => image.getAttribute("src")),
  );
  for (const source of empty) fault(`${theme}: ${source} has no size`);
}

async function solutions(page, fault) {
  const shut = await page.evaluate(() => {
    const folds = [...document.querySelectorAll("article .solution.dropdown")];
    return folds.filter((fold) => {
      const before = fold.getBoundingClientRect().height;
      (fold.querySelector("button, summary, .toggle-button") ?? fold).click();
      return fold.getBoundingClientRect().height <= before;
    }).length;
  });
  if (shut) fault(`${shut} solutions do not open`);
}

async function dials(page, fault) {
  const stuck = await page.$$eval("article figure.dial", (all) =>
    all.filter((dial) => {
      const input = dial.querySelector("input");
      return [input.max, input.min].some((value) => {
        input.value = value;
        input.dispatchEvent(new Event("input"));
        const seen = [...dial.querySelectorAll("img")].map((image) => image.offsetHeight > 0);
        return seen.filter(Boolean).length !== 1 || !seen[value];
      });
    }).length,
  );
  if (stuck) fault(`${stuck} dials show no picture or several`);
}

async function narrow(page, fault) {
  await page.setViewportSize({ width: NARROW, height: 844 });
  const width = await page.evaluate(() => document.documentElement.scrollWidth);
  if (width > NARROW) fault(`${width} pixels wide on a screen of ${NARROW}`);
}

async function accessible(page, theme, fault) {
  await page.evaluate((name) => (document.documentElement.dataset.theme = name), theme);
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() =>
    window.axe.run(document, { preload: false, resultTypes: ["violations"] }),
  );
  for (const { impact, id, nodes } of violations) {
    if (impact === "serious" || impact === "critical") {
      const where = nodes[0].target.join(" ");
      fault(`${theme}: ${impact} ${id}, ${nodes.length} times, first at ${where}`);
    }
  }
}

async function search(context, fault) {
  const page = await open(context, join(html, "search.html"), fault);
  await page.goto(`${page.url()}?q=momentum+attention`);
  const found = page.locator("#search-results li a").first();
  await found.waitFor({ timeout: 20000 }).catch(() => fault("search finds nothing"));
  await page.close();
}

// A server gives 404.html for any address; its links must lead back from all depths.
async function lost() {
  const text = readFileSync(join(html, "404.html"), "utf8");
  const page = await browser.newPage();
  await page.route("**", (route) => route.fulfill({ contentType: "text/html", body: text }));
  for (const path of ["none.html", "book/none.html"]) {
    await page.goto(`http://site.test/where/it/lies/${path}`);
    const links = await page.$$eval("a", (all) => all.map((link) => link.href));
    const outside = links.filter((link) => !/lies\/(book\/\w+|\w+)\.html$/.test(link));
    for (const link of outside) faults.push(`404.html under ${path} leads to ${link}`);
  }
  await page.close();
}

const executablePath = process.env.CHROMIUM;
const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const context = await browser.newContext({
  viewport: { width: 1280, height: 900 },
  reducedMotion: "reduce",
});
await context.setOffline(true);
const moves = (path) => readFileSync(path, "utf8").includes('http-equiv="Refresh"');
const all = pages(html).filter((path) => !moves(path));
for (const path of all) {
  const fault = (text) => faults.push(`${relative(html, path)}: ${text}`);
  const page = await open(context, path, fault);
  await equations(page, fault);
  for (const theme of ["light", "dark"]) {
    await figures(page, theme, fault);
    await accessible(page, theme, fault);
  }
  await solutions(page, fault);
  await dials(page, fault);
  await narrow(page, fault);
  await page.close();
}
await lost();
await search(context, (text) => faults.push(`search.html: ${text}`));
await browser.close();
for (const text of new Set(faults)) console.log(text);
if (faults.length) process.exit(1);
console.log(`${all.length} pages opened: nothing amiss`);
